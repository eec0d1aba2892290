"""Losses side by side, by hand."""

import json
from pathlib import Path

import pytest

from skipmega.errors import DataError
from skipmega.experiments.curves import curve_table
from skipmega.experiments.plan import load_plan, row_config


def write_run(folder: Path, name: str, losses: list[float]) -> Path:
    path = folder / f"{name}.jsonl"
    records = [
        {"kind": "train", "step": 10 * (i + 1), "loss": loss, "density": [0.4, 0.6], "routed_layers": [0, 1]}
        for i, loss in enumerate(losses)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_windows_and_their_largest_distance(tmp_path: Path) -> None:
    runs = {
        "slow": write_run(tmp_path, "slow", [4.0, 3.0, 2.0, 1.0, 0.5]),
        "fast": write_run(tmp_path, "fast", [4.0, 3.2, 2.0, 0.6, 0.5]),
    }
    lines = curve_table(runs, "slow", 20).splitlines()
    assert lines[0] == "| loss after steps | 20 | 40 | largest distance | densities |"
    assert lines[2] == "| slow | 3.5000 | 1.5000 | 0.0000 | 0.400-0.600 |"
    assert lines[3] == "| fast | 3.6000 | 1.3000 | 0.2000 | 0.400-0.600 |"


def test_runs_of_other_steps_are_not_compared(tmp_path: Path) -> None:
    runs = {"a": write_run(tmp_path, "a", [4.0, 3.0]), "b": write_run(tmp_path, "b", [4.0])}
    with pytest.raises(DataError, match="b: not of the same steps as a"):
        curve_table(runs, "a", 10)


def test_the_shipped_plan_differs_in_nothing_but_what_makes_it_fast() -> None:
    path = Path("pretrain/configs/bench/curves.yaml")
    plan = load_plan(path)
    configs = [row_config(path, plan, row) for row in plan.rows]
    assert len({str((c.model, c.routing, c.data, c.optimizer, c.schedule)) for c in configs}) == 1
    assert [c.training.compile for c in configs] == [False, *[True] * 3]
