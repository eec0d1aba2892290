#!/usr/bin/env python3
"""Trains the rows of a ladder, each at several learning rates and its best one again with other seeds, and
writes a table and figures: loss against executed FLOPs and against time.

python tools/ladder.py pretrain/configs/ladder/routers.yaml --output runs/ladder
python tools/ladder.py pretrain/configs/bench/curves.yaml --output runs/curves --curves 50
"""

import argparse
import json
from pathlib import Path

from skipmega.errors import ConfigError
from skipmega.launch.cli import run_script


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, help="YAML file: base, reference, rates, seeds, rows")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and the results")
    parser.add_argument("--rows", help="only these, separated by commas")
    parser.add_argument(
        "--at-once", type=int, help="trials on one GPU at a time (3); without a GPU, on this machine (1)"
    )
    parser.add_argument("--deadline", type=float, help="start nothing after so many seconds; rerun continues")
    parser.add_argument("--time-steps", type=int, default=0, help="then time so many steps of each row alone")
    parser.add_argument(
        "--curves", type=int, metavar="STEPS", help="also the first rate's losses side by side, every so many"
    )
    parser.add_argument("--only-report", action="store_true", help="write table and figures of what there is")
    arguments = parser.parse_args()

    import torch

    from skipmega.experiments.plan import Trial, load_plan, row_config
    from skipmega.experiments.report import draw, markdown_table, summarise_rows
    from skipmega.experiments.runner import LadderRunner

    plan = load_plan(arguments.plan)
    rows = arguments.rows.split(",") if arguments.rows else list(plan.rows)
    if unknown := [row for row in rows if row not in plan.rows]:
        raise ConfigError(f"--rows {','.join(unknown)}: not in the plan, which has {', '.join(plan.rows)}")
    devices = list(range(torch.cuda.device_count()))
    at_once = arguments.at_once or (3 if devices else 1)
    runner = LadderRunner(arguments.plan, plan, arguments.output, devices, at_once, arguments.deadline)
    if not arguments.only_report:
        runner.run(rows)
    times = arguments.output / "step_times.json"
    seconds = json.loads(times.read_text()) if times.is_file() else {}
    if arguments.time_steps and not arguments.only_report:
        seconds |= runner.time_rows(rows, arguments.time_steps)
        times.write_text(json.dumps(seconds, indent=1))
    configs = {row: row_config(arguments.plan, plan, row) for row in plan.rows}
    targets = {row: list((c.eval_densities or c.densities).values()) for row, c in configs.items()}
    summaries = summarise_rows(plan, list(runner.results.values()), targets, seconds)
    table = markdown_table(summaries, plan.reference)
    (arguments.output / "table.md").write_text(table)
    draw(summaries, plan.reference, arguments.output)
    print(table)
    if arguments.curves:
        from skipmega.experiments.curves import curve_table
        from skipmega.inspection.figures import plot_curves

        folders = {row: arguments.output / Trial(row, plan.rates[0], plan.seeds[0]).name for row in plan.rows}
        metrics = {row: path for row in rows if (path := folders[row] / "metrics.jsonl").is_file()}
        curves = curve_table(metrics, plan.reference, arguments.curves)
        (arguments.output / "curves.md").write_text(curves)
        plot_curves(metrics, arguments.output / "curves.png")
        print(curves)


if __name__ == "__main__":
    run_script(main)
