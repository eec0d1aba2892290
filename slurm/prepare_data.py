#!/usr/bin/env python3
"""Tokenizes a corpus on SLURM: an array of shards, then a job that joins them.

    python slurm/prepare_data.py CORPUS --tokenizer data/docs/tokenizer.model --output data/docs/train \\
        --valid-fraction 0.01 --shards 64 --workers 8 --time 2:00:00 --profile slurm/profiles/site.yaml

The result is bit-identical to that of tools/prepare_data.py. A shard that fails is tried again; run the same
command again, and only what is missing is made.
"""

import argparse
from pathlib import Path

from skipmega.launch.cli import run_script

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Show or submit the two jobs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("input", nargs="+", help="folders and files; a file is not cut, so there are at most as many shards")
    add("--output", required=True, type=Path, help="path of the data set, without an ending")
    add("--tokenizer", required=True, help="the .model file")
    add("--text-field", default="text", help="JSON field or parquet column of the text")
    add("--valid-fraction", type=float, default=0.0, help="share of documents for OUTPUT-valid")
    add("--skip-bad", action="store_true", help="skip and count records without usable text")
    add("--shards", type=int, required=True)
    add("--workers", type=int, default=4, help="tokenizing processes of a shard (4)")
    add("--time", required=True, help="limit of one shard, as sbatch reads it")
    add("--profile", help="YAML file of the site (slurm/profiles/)")
    add("--dry-run", action="store_true", help="show the batch scripts; SLURM is not needed")
    arguments = parser.parse_args()

    from skipmega.data.corpora.readers import Corpus
    from skipmega.data.corpora.splitting import check_shards
    from skipmega.launch.slurm.data_jobs import DataJob, preparation, render_data_jobs, submit_data_jobs
    from skipmega.launch.slurm.profile import load_profile

    check_shards(Corpus(arguments.input), arguments.shards)
    options = ["--tokenizer", arguments.tokenizer, "--text-field", arguments.text_field]
    options += ["--valid-fraction", str(arguments.valid_fraction), *["--skip-bad"] * arguments.skip_bad]
    output = arguments.output.absolute()
    steps = preparation(output, [*arguments.input, *options], arguments.shards, arguments.workers)
    job = DataJob(output, steps, arguments.workers, arguments.time)
    profile = load_profile(arguments.profile)
    if arguments.dry_run:
        print("\n".join(render_data_jobs(job, profile, ROOT)))
        return
    array, merge = submit_data_jobs(job, profile, ROOT)
    print(f"array {array} of {arguments.shards} shards, job {merge} joins them\nlogs {output}.log-*")


if __name__ == "__main__":
    run_script(main)
