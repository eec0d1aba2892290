#!/usr/bin/env python3
"""Evaluates a native checkpoint or a Hugging Face export on lm-eval tasks.

python tools/evaluate.py runs/quickstart --tasks heldout --include-path runs/quickstart/tasks
python tools/evaluate.py exported --tasks skiplayer24 --data-dir FOLDER-OF-SETS
torchrun --nproc-per-node 2 tools/evaluate.py RUN --tensor-parallel 2 --tasks piqa
python tools/evaluate.py RUN --tasks skiplayer24 --data-dir SETS --eval-densities 0.3,0.5,1 --figure out.png
"""

import argparse
from pathlib import Path

from skipmega.errors import ConfigError
from skipmega.launch.cli import run_script


def main() -> None:
    arguments = _parse()
    from skipmega.evaluation import evaluate_export

    tasks = arguments.tasks.split(",")
    settings = {
        "num_fewshot": arguments.num_fewshot,
        "include_paths": arguments.include_path,
        "data_dir": arguments.data_dir,
        "limit": arguments.limit,
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
    }
    if (Path(arguments.model) / "config.json").is_file():
        if arguments.eval_density is not None:
            raise ConfigError(
                f"--eval-density={arguments.eval_density} moves the thresholds of a native checkpoint, and "
                f"{arguments.model} is an export: export again with tools/export_hf.py --eval-density"
            )
        if arguments.eval_densities is not None:
            raise ConfigError(
                f"--eval-densities={arguments.eval_densities} moves the thresholds of a native checkpoint, "
                f"and {arguments.model} is an export: give the run"
            )
        if arguments.follow:
            raise ConfigError(
                f"--follow waits for checkpoints, and {arguments.model} is an export: give a run"
            )
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        report([evaluate_export(arguments.model, tasks, device=device, **settings)], arguments.output)
    elif arguments.eval_densities is not None:
        _draw_curve(arguments, tasks, settings)
    else:
        report(_native_results(arguments, tasks, settings), arguments.output)


def report(results, output):
    for result in results:
        print(result.table(), flush=True)
        if output:
            result.write_json(output)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a run folder, a checkpoint, or an export")
    parser.add_argument(
        "--tasks", required=True, help="tasks of lm-eval or suites (skiplayer24), separated by commas"
    )
    parser.add_argument("--include-path", action="append", default=[], help="folder of own task files")
    parser.add_argument("--data-dir", help="folder of the sets of a suite (left out: the Hugging Face cache)")
    parser.add_argument("--num-fewshot", type=int, default=1, help="examples in the context (1)")
    parser.add_argument("--limit", type=int, help="only the first so many documents of each task")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        help="texts of the model's length at once, and short ones more; 1: one at a time (8)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the choice of examples")
    parser.add_argument("--output", help="write the results to this JSON file too")
    parser.add_argument(
        "--eval-density",
        type=float,
        help="share of tokens that execute in each routed layer of a native model (left out: "
        "routing.eval_density, or as trained)",
    )
    parser.add_argument(
        "--eval-densities",
        help="several of them, separated by commas: one table of scores and held-out loss against executed "
        "operations",
    )
    parser.add_argument("--figure", help="draw that table into this PNG file")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="evaluate every checkpoint of a run until its last, into RUN/evaluations/",
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, help="of a native model's grid")
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="of a native model's grid")
    return parser.parse_args()


def _native_results(arguments, tasks, settings):
    """Yields results on the first process."""
    from skipmega.checkpoint.store import Checkpoint
    from skipmega.data.tokenizer import Tokenizer
    from skipmega.evaluation import evaluate_tasks
    from skipmega.inference.native import NativeModel
    from skipmega.launch.follow import follow_checkpoints
    from skipmega.parallel.grid import end_communication

    grid = _grid(arguments)

    def evaluate(checkpoint):
        model = NativeModel.load(checkpoint, grid, eval_density=arguments.eval_density)
        tokenizer = Tokenizer.load(checkpoint.config.data.tokenizer)
        return evaluate_tasks(model, tokenizer, tasks, model_name=str(checkpoint.path), **settings)

    if arguments.follow:
        results = follow_checkpoints(arguments.model, evaluate, grid)
    else:
        results = [evaluate(Checkpoint.open(arguments.model))]
    for result in results:
        if grid.rank == 0:
            yield result
    end_communication()


def _draw_curve(arguments, tasks, settings):
    from skipmega.checkpoint.store import Checkpoint
    from skipmega.data.tokenizer import Tokenizer
    from skipmega.evaluation import evaluate_tasks
    from skipmega.inspection.curves import plot_density_curve
    from skipmega.launch.density_curve import measure_curve
    from skipmega.parallel.grid import end_communication

    if arguments.follow or arguments.eval_density is not None:
        raise ConfigError("--eval-densities goes with one checkpoint: leave out --follow and --eval-density")
    try:
        densities = [float(text) for text in arguments.eval_densities.split(",")]
    except ValueError:
        raise ConfigError(
            f"--eval-densities={arguments.eval_densities}: give numbers separated by commas, as 0.25,0.5,1"
        ) from None
    grid = _grid(arguments)
    checkpoint = Checkpoint.open(arguments.model)
    tokenizer = Tokenizer.load(checkpoint.config.data.tokenizer)

    def evaluate(model):
        return evaluate_tasks(model, tokenizer, tasks, model_name=str(checkpoint.path), **settings)

    curve = measure_curve(checkpoint, grid, densities, evaluate)
    end_communication()
    if grid.rank != 0:
        return
    print(curve.table())
    if arguments.output:
        curve.write_json(arguments.output)
    if arguments.figure:
        points = curve.points
        plot_density_curve(
            [point.flops for point in points],
            [point.density for point in points],
            [point.loss for point in points],
            {name: [point.scores[name] for point in points] for name in points[0].scores},
            arguments.figure,
        )


def _grid(arguments):
    from skipmega.config import ParallelConfig
    from skipmega.launch.environment import discover_process
    from skipmega.parallel.grid import create_grid

    sizes = {
        "tensor_parallel": arguments.tensor_parallel,
        "pipeline_parallel": arguments.pipeline_parallel,
    }
    return create_grid(discover_process(), ParallelConfig(**sizes))


if __name__ == "__main__":
    run_script(main)
