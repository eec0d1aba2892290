#!/usr/bin/env python3
"""Says whether nodes are fit to train, and names those that are not; every batch job starts with it.

    python tools/doctor.py                                     # this machine
    srun --nodes 4 --ntasks-per-node 8 python tools/doctor.py CONFIG.yaml

Versions, limits, left-over locks, GPUs; with a configuration also its data and the space for a checkpoint;
with several processes clocks, the shared folder, and sums over the groups of the grid. Exits 1 if a node is
bad.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from skipmega.launch.cli import run_script

if TYPE_CHECKING:
    from skipmega.launch.doctor import Finding


def main() -> None:
    """Look at this node, then together with the others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="YAML file of the run that is to start")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--bad-nodes", type=Path, help="append the names of bad nodes to this file")
    arguments = parser.parse_args()

    from skipmega.config import RunConfig, load_config
    from skipmega.launch.backends import describe_kernels, describe_libraries
    from skipmega.launch.doctor import check_device, check_node, check_together, describe_health, examine_gpu
    from skipmega.launch.environment import discover_process
    from skipmega.parallel.grid import create_grid, end_communication

    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    process = discover_process()
    # before any communication, which a bad node would only break
    if process.local_rank == 0:
        _report(check_node(config), arguments.bad_nodes)
    grid = create_grid(process, config.parallel if config else None)
    health = examine_gpu(grid.device)
    _report(check_device(grid.device, health), arguments.bad_nodes)
    if grid.rank == 0:
        print(f"grid: {grid.describe()}\nlibraries: {describe_libraries(grid.device)}")
        if config:
            print(f"kernels: {describe_kernels(config, grid.device)}")
        print(describe_health(health), flush=True)
    together = check_together(grid, Path((config or RunConfig()).run_dir))
    if grid.rank == 0:
        _report(together, arguments.bad_nodes)
        print(f"doctor: {grid.world_size} processes are fit to train", flush=True)
    end_communication()


def _report(findings: Sequence[Finding], bad_nodes: Path | None) -> None:
    """Print findings; end here if one is fatal, its node written down."""
    for finding in findings:
        print(finding, flush=True)
    bad = [finding.node for finding in findings if finding.fatal]
    if bad and bad_nodes is not None:
        with bad_nodes.open("a") as stream:
            stream.write("".join(f"{node}\n" for node in dict.fromkeys(bad)))
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
