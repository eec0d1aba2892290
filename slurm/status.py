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
    parser.add_argument("run", nargs="+", type=Path, help="run folders")
    parser.add_argument("--attempts", action="store_true", help="also list what happened to each attempt")
    parser.add_argument("--follow", action="store_true", help="show changes until the run ends (one run)")
    parser.add_argument(
        "--stop", action="store_true", help="save now and end for good, or until submitted again"
    )
    arguments = parser.parse_args()
    if arguments.follow and len(arguments.run) > 1:
        parser.error("--follow takes one run")

    from skipmega.launch.slurm.status import ask_to_stop, follow, read_status

    if arguments.follow:
        follow(arguments.run[0])
        return
    for run in arguments.run:
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
