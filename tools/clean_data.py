#!/usr/bin/env python3
"""Filters, deduplicates and decontaminates a corpus, before it is tokenized.

    python tools/clean_data.py CONFIG [section.field=value ...] --workers 16     all of it
    python tools/clean_data.py CONFIG --stage filter --task 3                    one task, on a cluster
    python tools/clean_data.py CONFIG --report                                   what was dropped, and why

Run the same command again, and only what is missing is done. docs/data.md describes stages and CONFIG;
slurm/clean_data.py runs the tasks as arrays. The folder that it makes is an input of tools/prepare_data.py.
"""

import argparse

from skipmega.launch.cli import run_script


def main() -> None:
    """Do what the arguments say."""
    arguments = _parse_arguments()

    from skipmega.config import load_model
    from skipmega.data.cleaning.config import CleaningConfig
    from skipmega.data.cleaning.local import clean
    from skipmega.data.cleaning.report import write_report
    from skipmega.data.cleaning.stages import run_task

    config = load_model(CleaningConfig, arguments.config, arguments.overrides)
    if arguments.stage:
        record = run_task(config, arguments.stage, arguments.task)
        print(
            f"{record.stage} {record.number}: {record.kept.documents} of {record.given.documents} documents"
        )
    elif arguments.report:
        print(write_report(config).table())
    else:
        print(clean(config, arguments.workers).table())


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", help="YAML file of the cleaning")
    add("overrides", nargs="*", help="section.field=value, values in YAML")
    add("--workers", type=int, default=1, help="processes (1)")
    add("--stage", choices=("filter", "match", "sift"), help="do only one task, of this stage")
    add("--task", type=int, help="its number, from 0")
    add("--report", action="store_true", help="only sum up what all tasks have done")
    arguments = parser.parse_intermixed_args()
    if (arguments.stage is None) != (arguments.task is None):
        parser.error("--stage and --task go together")
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers} must be at least 1")
    return arguments


if __name__ == "__main__":
    run_script(main)
