#!/usr/bin/env python3
"""Builds the sample indices of a run before it starts, so that no process of a job waits for them.

    python tools/build_indices.py pretrain/configs/h100_300m.yaml
    srun --nodes 4 --ntasks-per-node 1 python tools/build_indices.py CONFIG data.index_cache=/scratch/indices

Give the configuration and the overrides of the run: its length, seed and data decide which samples come when.
They go where the run looks for them, its own folder or data.index_cache; what is there already is kept.
"""

import argparse
import time

from skipmega.launch.cli import run_script


def main() -> None:
    """Build them in this one process, whatever launcher started it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    arguments = parser.parse_args()

    from skipmega.config import load_config
    from skipmega.launch.run import build_data, index_cache, resolve

    config = load_config(arguments.config, arguments.overrides)
    began = time.monotonic()
    config, tokenizer = resolve(config, config.parallel.processes_per_replica)
    data = build_data(config, tokenizer)
    held_out = 0 if data.valid is None else len(data.valid)
    print(
        f"indices of {len(data.train)} training and {held_out} held-out samples in {index_cache(config)}, "
        f"{time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    run_script(main)
