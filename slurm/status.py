#!/usr/bin/env python3
"""Says how far submitted runs are: state, attempt, nodes, step, loss and the time left.

python slurm/status.py runs/h100_300m [--attempts]
python slurm/status.py runs/h100_300m --follow
"""

import argparse
from pathlib import Path

from skipmega.launch.cli import run_script


def main() -> None:
    """Show each run once, or follow one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+", type=Path, help="folders of runs and of arrays of runs")
    parser.add_argument("--attempts", action="store_true", help="also list what happened to each attempt")
    parser.add_argument("--follow", action="store_true", help="show changes until the run ends (one run)")
    parser.add_argument(
        "--stop", action="store_true", help="save now and end for good, or until submitted again"
    )
    arguments = parser.parse_args()

    from skipmega.launch.slurm.status import ask_to_stop, follow, read_status, runs_of

    runs = [run for folder in arguments.run for run in runs_of(folder)]
    if arguments.follow:
        if len(runs) > 1:
            parser.error(f"--follow takes one run, and these are {len(runs)}")
        follow(runs[0])
        return
    for run in runs:
        if arguments.stop:
            ask_to_stop(run)
        status = read_status(run)
        print(f"{run}: {status.describe()}")
        if arguments.attempts:
            for event in status.events:
                number = event.restart + 1
                print(f"  {event.time}  attempt {number}  {event.kind:8}  {event.checkpoint}  {event.detail}")


if __name__ == "__main__":
    run_script(main)
