#!/usr/bin/env python3
"""Cleans a corpus on SLURM: an array for each stage of tools/clean_data.py, and a job that sums them up.

    python slurm/clean_data.py CONFIG [section.field=value ...] --time 2:00:00 --profile site.yaml

The result is that of tools/clean_data.py. A task that fails is tried again; run the same command again, and
only what is missing is done.
"""

import argparse
from pathlib import Path

from skipmega.launch.cli import run_script

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Show or submit the jobs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", help="YAML file of the cleaning")
    add("overrides", nargs="*", help="section.field=value, values in YAML")
    add("--time", required=True, help="limit of one task, as sbatch reads it")
    add("--profile", help="YAML file of the site (slurm/profiles/)")
    add("--dry-run", action="store_true", help="show the batch scripts; SLURM is not needed")
    arguments = parser.parse_intermixed_args()

    from skipmega.config import load_model
    from skipmega.data.cleaning.config import CleaningConfig
    from skipmega.data.cleaning.stages import STAGES, check_cleaning, count_tasks
    from skipmega.launch.slurm.data_jobs import DataJob, cleaning, render_data_jobs, submit_data_jobs
    from skipmega.launch.slurm.profile import load_profile

    config = load_model(CleaningConfig, arguments.config, arguments.overrides)
    check_cleaning(config)
    output = Path(config.output).absolute()
    stages = [(stage, count_tasks(config, stage)) for stage in STAGES]
    steps = cleaning([str(Path(arguments.config).absolute()), *arguments.overrides], stages)
    job = DataJob(output, steps, 1, arguments.time)
    profile = load_profile(arguments.profile)
    if arguments.dry_run:
        print("\n".join(render_data_jobs(job, profile, ROOT)))
        return
    numbers = submit_data_jobs(job, profile, ROOT)
    print(f"jobs {', '.join(map(str, numbers))}; {numbers[-1]} sums up\nlogs {output}.log-*")


if __name__ == "__main__":
    run_script(main)
