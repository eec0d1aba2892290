#!/usr/bin/env python3
"""Pre-trains a model.

python pretrain/pretrain.py CONFIG.yaml [section.field=value ...]
torchrun --nproc-per-node 8 pretrain/pretrain.py CONFIG.yaml parallel.tensor_parallel=2
"""

import argparse

from skipmega.config import dump_config, load_config
from skipmega.launch.cli import run_script


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of the run; `defaults:` in it names files it builds on")
    parser.add_argument("overrides", nargs="*", help="section.field=value, values in YAML")
    parser.add_argument("--print-config", action="store_true", help="print the merged config and exit")
    # torch and DeepSpeed launchers of old pass it; what counts is in the environment
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(dump_config(config), end="")
        return

    # the libraries behind it take seconds to import: not for a config that is refused anyway
    from skipmega.launch.environment import discover_process
    from skipmega.launch.run import pretrain

    pretrain(config, discover_process())


if __name__ == "__main__":
    run_script(main)
