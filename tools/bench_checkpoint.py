#!/usr/bin/env python3
"""Measures what saving and loading checkpoints cost, on random tokens.

python tools/bench_checkpoint.py pretrain/configs/h100_300m.yaml model.vocab_size=32000 --output runs/bench

Writes OUTPUT/saves.json and OUTPUT/saves.md; the run itself, in OUTPUT/run, is removed afterwards.
"""

import argparse
import json
import shutil
from pathlib import Path

from skipmega.launch.cli import run_script


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", help="section.field=value; model.vocab_size is needed")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--quiet-steps", type=int, default=15, help="steps without a save")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--most-steps", type=int, default=20, help="during one save; then it is waited for")
    arguments = parser.parse_args()

    from skipmega.config import load_config
    from skipmega.experiments.save_times import measure_saves, table
    from skipmega.launch.environment import discover_process
    from skipmega.parallel.grid import create_grid, end_communication

    run = arguments.output / "run"
    config = load_config(arguments.config, [*arguments.overrides, f"run_dir={run}"])
    process = discover_process()
    grid = create_grid(process, config.parallel)
    record = measure_saves(config, grid, arguments.quiet_steps, arguments.saves, arguments.most_steps)
    if grid.rank == 0:
        (arguments.output / "saves.json").write_text(json.dumps(record, indent=2))
        (arguments.output / "saves.md").write_text(table(record) + "\n")
        print(table(record))
        shutil.rmtree(run)
    end_communication()


if __name__ == "__main__":
    run_script(main)
