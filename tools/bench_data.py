#!/usr/bin/env python3
"""Measures how fast data of 10 billion to 1.6 trillion tokens are opened and read, and in how much memory.

    python tools/bench_data.py --tokenizer TOKENIZER.model --folder /scratch/sparse
    python tools/bench_data.py ... --order documents --tokens 1e10

Files are sparse and need a few hundred MB. Each line is a process of its own: first with nothing of indices
and manifests in the page cache, then again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from skipmega.launch.cli import run_script


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="a sentencepiece model of at most 65536 ids")
    parser.add_argument("--folder", type=Path, required=True, help="where the files go; they are kept")
    parser.add_argument("--tokens", type=float, nargs="+", default=[1e10, 1e11, 1.6e12])
    parser.add_argument("--shard-tokens", type=float, default=1e10)
    parser.add_argument("--order", choices=("stream", "documents"), default="stream")
    parser.add_argument("--inside", action="store_true", help="measure here; what processes are started with")
    arguments = parser.parse_args()

    from skipmega.data.tokenizer import Tokenizer
    from skipmega.experiments.data_sizes import forget_pages, measure, write_sparse_shards

    tokenizer, shard_tokens = Tokenizer.load(arguments.tokenizer), int(arguments.shard_tokens)
    for tokens in map(int, arguments.tokens):
        folder = arguments.folder / str(tokens)
        pattern = write_sparse_shards(folder, -(-tokens // shard_tokens), shard_tokens, tokenizer)
        if arguments.inside:
            print(json.dumps(measure(pattern, tokenizer, tokens, arguments.order, folder / "cache")))
            return
        for cold in (True, False):
            if cold:
                forget_pages(folder)
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, __file__, "--inside", "--tokens", str(tokens), "--order", arguments.order,
                 "--tokenizer", arguments.tokenizer, "--folder", arguments.folder,
                 "--shard-tokens", str(shard_tokens)],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            record = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps({"cold": cold, **record, "process_seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    run_script(main)
