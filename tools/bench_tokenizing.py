#!/usr/bin/env python3
"""Measures how fast a corpus is tokenized, beside sentencepiece alone, megatron-core and datatrove.

    python tools/bench_tokenizing.py corpus.jsonl --tokenizer T.model --rounds 5

Rounds go through all of them in turn; ratios are taken within a round, and their median printed. Then the
same corpus ten times over, for its memory.
"""

import argparse
import os
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
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="1, and others (1 2)")
    parser.add_argument("--grown", type=int, nargs="*", default=[1, 10], help="corpora for memory (1 10)")
    arguments = parser.parse_args()

    from skipmega.data.corpora.readers import Corpus
    from skipmega.data.tokenizer import Tokenizer
    from skipmega.experiments.tokenizing import grown_corpus, measure, ways

    tokenizer = Tokenizer.load(arguments.tokenizer)
    megabytes = sum(len(document.text.encode()) for document in Corpus([arguments.corpus])) / 1e6
    print(f"{megabytes:.2f} MB of text, {arguments.rounds} rounds, {os.cpu_count()} processors")
    with tempfile.TemporaryDirectory() as name:
        compared = ways(arguments.corpus, tokenizer, Path(name), arguments.processes)
        if not any(way.startswith("datatrove") for way in compared):
            print("datatrove is not installed: left out")
        rounds = []
        for number in range(1, arguments.rounds + 1):
            rounds.append({})
            for way, do in compared.items():
                rounds[-1][way] = measure(do)
                print(f"round {number}: {way} took {rounds[-1][way].clock:.1f} s", flush=True)
        print(f"{'':20}MB for a second of a processor; MB a second on the clock; each over sentencepiece's")
        for way in compared:
            costs = [each[way] for each in rounds]
            said = []
            for of in ("processor", "clock"):
                ratios = [getattr(each["sentencepiece, 1"], of) / getattr(each[way], of) for each in rounds]
                speed = megabytes / median(getattr(cost, of) for cost in costs)
                said.append(f"{speed:6.2f} {median(ratios):5.2f} ({min(ratios):.2f} - {max(ratios):.2f})")
            print(f"{way:20}{'   '.join(said)}", flush=True)
        for times in arguments.grown:
            grown = grown_corpus(arguments.corpus, times, Path(name))
            cost = measure(ways(grown, tokenizer, Path(name))["skipmega, 1"])
            print(f"{times * megabytes:.1f} MB: {cost.mib:.0f} MiB above what was resident before")


if __name__ == "__main__":
    run_script(main)
