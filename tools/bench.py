#!/usr/bin/env python3
"""Measures speed against its targets on one device: layers, attention, peers, steps; or counts the floor.

    python tools/bench.py layer attention peers step --output runs/bench/speed --deadline 420
    python tools/bench.py report --output runs/bench/speed
    python tools/bench.py profile          # where the time of a layer goes
    python tools/bench.py profile-step --layers 6  # where the time of a step of so many layers goes
    python tools/bench.py floor            # what a layer and a step cost at least, by count

Arguments with a = are overrides (section.field=value) of every row. What the output folder has a record of is
not measured again.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from skipmega.launch.cli import run_script

if TYPE_CHECKING:
    from skipmega.experiments.speed.bench import Bench

MODES = ("layer", "attention", "peers", "step")
OTHERS = ("report", "profile", "profile-step", "floor")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", help=f"of {', '.join([*MODES, *OTHERS])}; and overrides")
    parser.add_argument("--base", type=Path, default=Path("pretrain/configs/bench/speed_1b.yaml"))
    parser.add_argument("--output", type=Path, default=Path("runs/bench/speed"), help="folder of the records")
    parser.add_argument("--deadline", type=float, help="begin no row after so many seconds")
    parser.add_argument("--only", help="rows whose name has this in it")
    parser.add_argument("--layers", type=int, default=4, help="of a stack (4)")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of a stack (10)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps (3)")
    arguments = parser.parse_intermixed_args()
    modes = [word for word in arguments.what if "=" not in word]
    overrides = [word for word in arguments.what if "=" in word]
    if unknown := set(modes) - {*MODES, *OTHERS}:
        parser.error(f"no mode: {', '.join(sorted(unknown))}")

    if "floor" in modes:
        from skipmega.config import load_config
        from skipmega.experiments.floor import H100, H200, operation_table, tables

        config = load_config(arguments.base, overrides)
        grouped = load_config(arguments.base, [*overrides, "model.num_key_value_heads=4"])
        operations = (
            f"{name}, {H100.name}\n\n{operation_table(shape, H100)}"
            for name, shape in (("MHA", config), ("GQA", grouped))
        )
        print(*(tables(config, device) for device in (H100, H200)), *operations, sep="\n")
    chosen = [mode for mode in MODES if mode in modes]
    if chosen:
        _measure(chosen, overrides, arguments)
    if {"profile", "profile-step"} & set(modes):
        _explain(modes, overrides, arguments)
    if chosen or "report" in modes:
        from skipmega.experiments.speed.bench import read_records
        from skipmega.experiments.speed.targets import write_report

        records = read_records(arguments.output)
        print(write_report(records, arguments.output) if records else "nothing is measured yet")


def _bench(overrides: list[str], arguments: argparse.Namespace) -> "Bench":
    from skipmega.experiments.speed.bench import Bench
    from skipmega.launch.environment import discover_process
    from skipmega.parallel.grid import create_grid

    return Bench(
        arguments.base, overrides, create_grid(discover_process()), arguments.layers, arguments.repeats,
        steps=arguments.steps,
    )  # fmt: skip


def _measure(modes: list[str], overrides: list[str], arguments: argparse.Namespace) -> None:
    from skipmega.experiments.speed.attention import attention_rows
    from skipmega.experiments.speed.bench import run_rows
    from skipmega.experiments.speed.layers import layer_rows, peer_rows
    from skipmega.experiments.speed.steps import step_rows
    from skipmega.parallel.grid import end_communication

    made = {"layer": layer_rows, "step": step_rows, "attention": attention_rows, "peers": peer_rows}
    rows = [row for mode in modes for row in made[mode]() if (arguments.only or "") in row.name]
    run_rows(rows, _bench(overrides, arguments), arguments.output, arguments.deadline)
    end_communication()


def _explain(modes: list[str], overrides: list[str], arguments: argparse.Namespace) -> None:
    from skipmega.experiments.speed.profiles import profile_layers, profile_steps
    from skipmega.parallel.grid import end_communication

    bench = _bench(overrides, arguments)
    if "profile" in modes:
        print(profile_layers(bench, arguments.output))
    if "profile-step" in modes:
        print(profile_steps(bench, arguments.output))
    end_communication()


if __name__ == "__main__":
    run_script(main)
