#!/usr/bin/env python3
"""Train a sentencepiece BPE tokenizer on a corpus."""

import argparse
from collections.abc import Iterator, Sequence
from itertools import chain

from skipmega.data.corpora.readers import Corpus, first_bytes
from skipmega.data.tokenizer import train_tokenizer
from skipmega.launch.cli import run_script


def main() -> None:
    """Parse the arguments, train, and say what came of it."""
    arguments = _parse_arguments()
    corpora = [
        Corpus([path], text_field=arguments.text_field, skip_bad=arguments.skip_bad)
        for path in arguments.input
    ]
    tokenizer = train_tokenizer(
        _texts(corpora, int(arguments.max_mb * 1e6)),
        arguments.output,
        arguments.vocab_size,
        overwrite=arguments.overwrite,
    )
    skipped = sum(corpus.bad_records for corpus in corpora)
    print(
        f"{tokenizer.path}: {tokenizer.size} ids, SHA-256 {tokenizer.sha256}; {skipped} bad records skipped"
    )


def _texts(corpora: Sequence[Corpus], limit: int) -> Iterator[str]:
    """Up to ``limit`` bytes of text from each corpus."""
    documents = chain.from_iterable(first_bytes(iter(corpus), limit) for corpus in corpora)
    return (document.text for document in documents)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "input",
        nargs="+",
        help="folders and files: .jsonl (also .gz, .zst), .parquet, anything else is one text document",
    )
    parser.add_argument("--output", required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="number of token ids")
    parser.add_argument("--text-field", default="text", help="JSON field or parquet column of the text")
    parser.add_argument(
        "--max-mb",
        type=float,
        default=200.0,
        help="read at most this many MB (10^6 bytes) of text from each input; all is held in memory",
    )
    parser.add_argument("--skip-bad", action="store_true", help="skip and count records without usable text")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
