#!/usr/bin/env python3
"""Exports a checkpoint to a Hugging Face folder that loads without skipmega.

    python tools/export_hf.py RUN_OR_CHECKPOINT OUT

The checkpoint may come from any grid. What was written is loaded again and compared with the native
model; the largest logit difference is printed and must lie under the tolerance.
"""

import argparse

from skipmega.launch.cli import run_script


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a run folder (its newest checkpoint is taken) or one checkpoint")
    parser.add_argument("out", help="folder to write; may be an earlier export")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (fp32)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest logit difference (1e-4)")
    parser.add_argument(
        "--eval-density",
        type=float,
        help="share of tokens that execute in each routed layer (left out: routing.eval_density, or as "
        "trained)",
    )
    arguments = parser.parse_args()

    from skipmega.checkpoint.store import Checkpoint
    from skipmega.hf.from_checkpoint import export_checkpoint

    checkpoint = Checkpoint.open(arguments.checkpoint)
    difference = export_checkpoint(
        checkpoint, arguments.out, arguments.dtype, arguments.tolerance, arguments.eval_density
    )
    if difference is None:
        print(f"{checkpoint.path} -> {arguments.out} (bf16 weights: not compared, rounding flips routers)")
    else:
        print(f"{checkpoint.path} -> {arguments.out}, largest logit difference {difference:.1e}")


if __name__ == "__main__":
    run_script(main)
