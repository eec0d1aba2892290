#!/usr/bin/env python3
"""Measures training steps of several models on several grids: time, memory, communication, balance.

python tools/bench_steps.py pretrain/configs/bench/grids_1b.yaml --output runs/bench/grids
"""

import argparse
from pathlib import Path

from skipmega.launch.cli import run_script


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, help="YAML file: base, models, grids")
    parser.add_argument("--output", type=Path, required=True, help="folder of the records; rerun continues")
    parser.add_argument("--deadline", type=float, help="end what still runs after so many seconds")
    parser.add_argument("--inside", metavar="GRID", help="measure here; what the worlds are started with")
    arguments = parser.parse_args()

    from skipmega.experiments.step_plan import (
        load_step_plan,
        markdown_table,
        read_records,
        run_plan,
        step_config,
    )
    from skipmega.experiments.step_times import measure_grid
    from skipmega.launch.environment import discover_process
    from skipmega.parallel.grid import create_grid, end_communication

    plan = load_step_plan(arguments.plan)
    if arguments.inside is None:
        run_plan(Path(__file__), arguments.plan, plan, arguments.output, arguments.deadline)
        print(markdown_table(plan, read_records(arguments.output)))
        return
    model = plan.models_on(arguments.inside)[0]
    parallel = step_config(arguments.plan, plan, arguments.inside, model).parallel
    grid = create_grid(discover_process(), parallel)
    measure_grid(arguments.plan, plan, arguments.inside, grid, arguments.output)
    end_communication()


if __name__ == "__main__":
    run_script(main)
