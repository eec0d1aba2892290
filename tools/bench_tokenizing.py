#!/usr/bin/env python3
"""Measures how fast a corpus is tokenized, beside sentencepiece alone, megatron-core and datatrove.

    python tools/bench_tokenizing.py corpus.jsonl --tokenizer T.model --rounds 5

Rounds go through all of them in turn; ratios are taken within a round, and their median printed. Then the
same corpus ten times over, for its memory.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

from skipmega.launch.cli import run_script


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path, help="a JSON lines file, not compressed")
    parser.add_argument("--tokenizer", required=True, help="a sentencepiece model")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    from skipmega.data.readers import Corpus
    from skipmega.data.tokenizer import Tokenizer
    from skipmega.experiments.tokenizing import grown_corpus, measure, ways

    tokenizer = Tokenizer.load(arguments.tokenizer)
    megabytes = sum(len(document.text.encode()) for document in Corpus([arguments.corpus])) / 1e6
    print(f"{megabytes:.2f} MB of text, {arguments.rounds} rounds")
    with tempfile.TemporaryDirectory() as name:
        compared = ways(arguments.corpus, tokenizer, Path(name))
        rounds = [{way: measure(do) for way, do in compared.items()} for _ in range(arguments.rounds)]
        for way in compared:
            costs = [each[way] for each in rounds]
            ratios = [each["sentencepiece"].processor / each[way].processor for each in rounds]
            print(
                f"{way:24}{megabytes / median(cost.processor for cost in costs):7.2f} MB a second on a "
                f"processor, {median(ratios):.2f} of sentencepiece ({min(ratios):.2f} to {max(ratios):.2f}); "
                f"{megabytes / median(cost.clock for cost in costs):.2f} MB/s on the clock"
            )
        for times in (1, 10):
            grown = grown_corpus(arguments.corpus, times, Path(name))
            cost = measure(ways(grown, tokenizer, Path(name))["skipmega, 1 process"])
            print(f"{times * megabytes:.1f} MB: {cost.mib:.0f} MiB above what was resident before")


if __name__ == "__main__":
    run_script(main)
