#!/usr/bin/env python3
"""Tokenize a corpus into a megatron-core data set (.bin, .idx) with a manifest, or verify one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from skipmega.launch.cli import run_script

if TYPE_CHECKING:
    from skipmega.data.pairs.manifest import Manifest


def main() -> None:
    """Parse the arguments, prepare or verify, and say what came of it."""
    arguments = _parse_arguments()

    # behind the arguments: megatron-core takes seconds to import
    from skipmega.data.corpora.readers import Corpus
    from skipmega.data.pairs.indexed import verify_checksums
    from skipmega.data.tokenizer import Tokenizer
    from skipmega.data.tokenizing.prepare import prepare_dataset
    from skipmega.data.tokenizing.shards import merge_shards, prepare_shard

    if arguments.verify:
        _describe(arguments.output, verify_checksums(arguments.output))
        return
    corpus = Corpus(arguments.input, text_field=arguments.text_field, skip_bad=arguments.skip_bad)
    tokenizer, output = Tokenizer.load(arguments.tokenizer), Path(arguments.output)
    held_out, workers, overwrite = arguments.valid_fraction, arguments.workers, arguments.overwrite
    if arguments.shard:
        shard, shards = arguments.shard
        pairs = prepare_shard(
            corpus, output, tokenizer, shard, shards, workers=workers, valid_fraction=held_out
        )
    elif arguments.merge:
        pairs = merge_shards(
            corpus, output, tokenizer, arguments.merge, valid_fraction=held_out, overwrite=overwrite
        )
    else:
        pairs = prepare_dataset(
            corpus, output, tokenizer, workers=workers, valid_fraction=held_out, overwrite=overwrite
        )
    for pair in pairs:
        _describe(str(pair.prefix), pair.manifest)


def _describe(prefix: str, manifest: Manifest) -> None:
    print(
        f"{prefix}: {manifest.documents} documents, {manifest.tokens} tokens, "
        f"{manifest.text_bytes / max(manifest.tokens, 1):.2f} bytes a token; of the corpus, "
        f"{manifest.empty_documents} empty documents and {manifest.bad_records} bad records were skipped"
    )


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    return int(index), int(count)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "input",
        nargs="*",
        help="folders and files: .jsonl and .wet (also .gz, .zst), .parquet, what tools/clean_data.py made; "
        "any other file is one text document",
    )
    parser.add_argument("--output", required=True, help="path of the data set, without an ending")
    parser.add_argument("--tokenizer", help="the .model file")
    parser.add_argument("--text-field", default="text", help="JSON field or parquet column of the text")
    parser.add_argument("--workers", type=int, default=1, help="tokenizing processes")
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=0.0,
        help="share of documents, chosen by a hash of their text, to write to OUTPUT-valid instead",
    )
    parser.add_argument("--skip-bad", action="store_true", help="skip and count records without usable text")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing data set")
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="only the I-th of N shards (from 0), which go to OUTPUT.shards/; a finished one is left alone",
    )
    parser.add_argument("--merge", type=int, metavar="N", help="join N shards that are all there")
    parser.add_argument(
        "--verify", action="store_true", help="only compare the data set at OUTPUT with its checksums"
    )
    arguments = parser.parse_args()
    if not arguments.verify and not (arguments.input and arguments.tokenizer):
        parser.error("INPUT and --tokenizer are needed, unless --verify is given")
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers} must be at least 1")
    return arguments


if __name__ == "__main__":
    run_script(main)
