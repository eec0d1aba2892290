"""Plans of step times: what they refuse, what is left to measure, and the table."""

import json
from pathlib import Path

import pytest
import yaml

from skipmega.errors import ConfigError
from skipmega.experiments.step_plan import (
    load_step_plan,
    markdown_table,
    missing_models,
    run_plan,
    step_config,
)

BASE = "model: {num_layers: 4, vocab_size: 128}\nrouting: {router: always}\ndata: {sequence_length: 64}\n"
PLAN = {
    "base": "base.yaml",
    "models": {"dense": [], "half": ["routing.router=quantile"], "small": ["half", "model.hidden_size=96"]},
    "grids": {
        "one": {"processes": 1},
        "two": {"processes": 2, "models": ["half"], "overrides": ["parallel.pipeline_parallel=2"]},
    },
}
# what stands in for a world: it measures the first model that is missing
WORLD = """
import json, os, sys
plan, _, output, _, grid = sys.argv[1:]
if grid == "two":
    sys.exit(3)
if os.environ["RANK"] == "0":
    with open(output + "/steps.jsonl", "a") as records:
        record = {"grid": grid, "model": "dense", "world_size": os.environ["WORLD_SIZE"]}
        print(json.dumps(record), file=records)
"""
MEASURED = {
    "seconds_per_step": 0.5, "fastest": 0.4, "slowest": 0.6, "tokens_per_second_per_device": 1000.0,
    "executed_tflops_per_device": 5.0, "communication_seconds": None, "peak_memory_gib": 2.0,
}  # fmt: skip


def write_plan(folder: Path, **changes: object) -> Path:
    (folder / "base.yaml").write_text(BASE)
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN, **changes}))
    return path


def test_a_row_is_the_base_with_the_overrides_of_model_and_grid(tmp_path: Path) -> None:
    path = write_plan(tmp_path)
    plan = load_step_plan(path)
    config = step_config(path, plan, "two", "small")
    assert (config.routing.router, config.model.hidden_size) == ("quantile", 96)
    assert config.parallel.pipeline_parallel == 2
    assert plan.models_on("one") == ["dense", "half", "small"]
    assert plan.models_on("two") == ["half"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {"dense": ["sparse"]}}, "'sparse' is no section.field=value"),
        ({"grids": {"one": {"processes": 1, "models": ["big"]}}}, "not there: big"),
        ({"grids": {"one": {"processes": 0}}}, "grids.one.processes"),
        ({"grids": {"three": {"processes": 3, "overrides": ["parallel.tensor_parallel=2"]}}}, "3 processes"),
        ({"base": "missing.yaml"}, "missing.yaml"),
    ],
)
def test_bad_plans_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_step_plan(write_plan(tmp_path, **changes))


def test_worlds_measure_what_is_missing_and_a_failing_one_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output, script = write_plan(tmp_path), tmp_path / "out", tmp_path / "world.py"
    script.write_text(WORLD)
    plan = load_step_plan(path)
    run_plan(script, path, plan, output, deadline=120)
    told = capsys.readouterr().out
    assert "one: measured" in told
    assert "two: FAILED with code 1" in told
    assert missing_models(plan, "one", output) == ["half", "small"]
    assert missing_models(plan, "two", output) == ["half"]
    (record,) = [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]
    assert record == {"grid": "one", "model": "dense", "world_size": "1"}


def test_speed_is_told_beside_the_first_grid(tmp_path: Path) -> None:
    plan = load_step_plan(write_plan(tmp_path))
    routed = {"rank_imbalance": 1.25, "moved": 0.125}
    table = markdown_table(
        plan,
        [
            {"model": "half", "grid": "one", **MEASURED, **routed},
            {"model": "half", "grid": "two", **MEASURED, "tokens_per_second_per_device": 900.0},
        ],
    ).splitlines()
    assert table[2] == "| half | one | 500 (400-600) | 1,000 | 1.00 | 5 |  | 2.0 | 1.250 | 12.5% |"
    assert table[3] == "| half | two | 500 (400-600) | 900 | 0.90 | 5 |  | 2.0 |  |  |"
