#!/usr/bin/env python3
"""Measures evaluation of a checkpoint against lm-eval's hf model on its export, on the same questions.

python tools/bench_evaluation.py runs/quickstart/run --data-dir sets --limit 50 --output runs/bench/evaluation

Writes OUTPUT/evaluation.md and OUTPUT/evaluation.json; the export it makes, OUTPUT/export, stays.
"""

import argparse
import json
from pathlib import Path

from skipmega.launch.cli import run_script


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a run folder or one checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--tasks", default="skiplayer24", help="tasks or suites, separated by commas")
    parser.add_argument("--data-dir", help="folder of the sets of a suite")
    parser.add_argument("--include-path", action="append", default=[], help="folder of own task files")
    parser.add_argument("--limit", type=int, help="only the first so many documents of each task")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        help="texts of the model's length at once, and short ones more; 1: one at a time (8)",
    )
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    from skipmega.checkpoint.store import Checkpoint
    from skipmega.config import ParallelConfig
    from skipmega.data.tokenizer import Tokenizer
    from skipmega.evaluation import evaluate_by_lm_eval, evaluate_export, evaluate_tasks
    from skipmega.experiments.evaluation_speed import REFERENCE, measure_evaluation
    from skipmega.hf.from_checkpoint import export_checkpoint
    from skipmega.inference.native import NativeModel
    from skipmega.launch.environment import discover_process
    from skipmega.parallel.grid import create_grid, end_communication

    tasks, export = arguments.tasks.split(","), arguments.output / "export"
    settings = {
        "num_fewshot": 1,
        "include_paths": arguments.include_path,
        "data_dir": arguments.data_dir,
        "batch_size": arguments.batch_size,
    }
    checkpoint = Checkpoint.open(arguments.checkpoint)
    export_checkpoint(checkpoint, export, "fp32", tolerance=1e-2)
    grid = create_grid(discover_process(), ParallelConfig())
    model, device = NativeModel.load(checkpoint, grid), grid.device.type
    tokenizer = Tokenizer.load(checkpoint.config.data.tokenizer)
    times = measure_evaluation(
        {
            "native checkpoint": lambda limit: evaluate_tasks(
                model, tokenizer, tasks, limit=limit, **settings
            ),
            "export": lambda limit: evaluate_export(export, tasks, device=device, limit=limit, **settings),
            REFERENCE: lambda limit: evaluate_by_lm_eval(
                export, tasks, device=device, limit=limit, **settings
            ),
        },
        arguments.limit,
        arguments.repeats,
    )
    end_communication()
    (arguments.output / "evaluation.json").write_text(json.dumps(times.plain(), indent=2))
    (arguments.output / "evaluation.md").write_text(times.table() + "\n")
    print(times.table())


if __name__ == "__main__":
    run_script(main)
