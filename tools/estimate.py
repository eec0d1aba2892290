#!/usr/bin/env python3
"""What configurations cost before a GPU is touched: parameters, FLOPs, memory of a process, time of the run.

    python tools/estimate.py pretrain/configs/h100_300m.yaml model.vocab_size=32000
    python tools/estimate.py pretrain/configs/paper/*.yaml --processes 8

Arguments with a = are overrides (section.field=value) of every configuration. One configuration is described,
several become a table, with FLOPs relative to the first.
"""

import argparse
import json
from pathlib import Path

from skipmega.launch.cli import run_script


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="+", help="YAML files, and overrides of all of them")
    parser.add_argument("--processes", type=int, default=1, help="devices of the run (1)")
    parser.add_argument("--mfu", type=float, default=0.4, help="executed FLOPs over the peak's, 0 to 1 (0.4)")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="of one device (989: dense bf16, H100 and H200 SXM)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of plain numbers instead")
    arguments = parser.parse_intermixed_args()

    from skipmega.config import load_config
    from skipmega.launch.estimate import describe, estimate, table

    files = [argument for argument in arguments.config if "=" not in argument]
    overrides = [argument for argument in arguments.config if "=" in argument]
    if not files:
        parser.error("name at least one configuration file")
    results = [
        estimate(
            load_config(file, overrides),
            arguments.processes,
            arguments.mfu,
            arguments.peak_tflops,
            name=Path(file).stem,
        )
        for file in files
    ]
    if arguments.json:
        print(json.dumps([result.to_dict() for result in results], indent=2))
    else:
        print(describe(results[0]) if len(results) == 1 else table(results))


if __name__ == "__main__":
    run_script(main)
