#!/usr/bin/env python3
"""Shuffles documents over all pairs of a source on SLURM, and packs them into samples if asked to: an array.

    python slurm/shuffle_data.py 'data/web-*' mixed/web --shards 1000 --pack 2048 --time 1:00:00 \\
        --profile slurm/profiles/site.yaml

The result is that of tools/data.py shuffle. A shard that fails is tried again; run the same command again,
and only what is missing is made.
"""

import argparse
from pathlib import Path

from skipmega.launch.cli import run_script

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Show or submit the array."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", help="a pair without its ending, or a pattern")
    add("output", type=Path, help="path of the result; each shard has its number after it")
    add("--shards", type=int, required=True)
    add("--seed", type=int, default=0)
    add("--pack", type=int, metavar="LENGTH", help="for data.sequence_length LENGTH, best fit")
    add("--time", required=True, help="limit of one shard, as sbatch reads it")
    add("--profile", help="YAML file of the site (slurm/profiles/)")
    add("--dry-run", action="store_true", help="show the batch script; SLURM is not needed")
    arguments = parser.parse_args()

    from skipmega.data.files import find_pairs
    from skipmega.data.pairs.arrangement import Arrangement
    from skipmega.launch.slurm.data_jobs import DataJob, render_data_jobs, shuffling, submit_data_jobs
    from skipmega.launch.slurm.profile import load_profile

    plan = Arrangement(
        tuple(find_pairs(arguments.data)), arguments.output, arguments.seed, arguments.shards, arguments.pack
    )
    plan.check()
    options = ["--seed", str(plan.seed), "--shards", str(plan.shards)]
    options += [] if plan.sequence_length is None else ["--pack", str(plan.sequence_length)]
    output = plan.output.absolute()
    job = DataJob(output, shuffling([arguments.data, str(output), *options], plan.shards), 1, arguments.time)
    profile = load_profile(arguments.profile)
    if arguments.dry_run:
        print("\n".join(render_data_jobs(job, profile, ROOT)))
        return
    (array,) = submit_data_jobs(job, profile, ROOT)
    print(f"array {array} of {plan.shards} shards\nlogs {output}.log-*")


if __name__ == "__main__":
    run_script(main)
