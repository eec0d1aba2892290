"""Where records go, each read back the way its users read it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from skipmega.config import RunConfig, build_config
from skipmega.training import sinks
from skipmega.training.sinks import ConsoleSink, JsonlSink, TensorBoardSink, WandbSink, open_sinks

TRAIN: dict[str, Any] = {
    "kind": "train", "step": 20, "steps": 100, "tokens": 4096, "loss": 3.25, "learning_rate": 1.5e-4,
    "grad_norm": 0.875, "tokens_per_second": 12345.6, "executed_tflops": 1.25, "dense_tflops": 2.5,
    "eta_seconds": 3723.4, "routed_layers": [1, 2], "density": [0.4, 0.6], "dropped": [0.0, 0.125],
}  # fmt: skip
EVAL: dict[str, Any] = {
    "kind": "eval", "step": 20, "loss": 3.5, "routed_layers": [1, 2], "density": [0.5, 0.75],
    "dropped": [0.0, 0.0],
}  # fmt: skip
START = {"kind": "start", "step": 0, "attempt": 1}
TASKS = {"kind": "tasks", "step": 20, "own_copa/acc": 0.5, "own/understanding": 0.25, "missing": "own_cb"}
ALARM = {"kind": "alarm", "step": 20, "message": "layer 3 is dead: 0.0% of the tokens chose it"}
LISTS = ("dropped", "padded", "entropy", "group_imbalance", "rank_imbalance", "router_gradient")


def test_jsonl_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    sink = JsonlSink(path)
    for written, record in enumerate([START, TRAIN, ALARM, EVAL], start=1):
        sink.write(record)
        assert len(path.read_text().splitlines()) == written, "on disk at once, not only when closed"
    sink.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [START, TRAIN, ALARM, EVAL]


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for attempt in (1, 2):
        sink = JsonlSink(path)
        sink.write({"kind": "start", "step": 0, "attempt": attempt})
        sink.close()
    assert [json.loads(line)["attempt"] for line in path.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (START, "step 0: start of attempt 1"),
        (ALARM, "step 20: ALARM: layer 3 is dead: 0.0% of the tokens chose it"),
        (TASKS, "step 20: own_copa/acc 0.5, own/understanding 0.25"),
        (EVAL, "step 20: held-out loss 3.5000  density 0.625 (0.50-0.75)"),
        (
            EVAL | {"source_loss": {"web": 3.25, "code": 1.5}},
            "step 20: held-out loss 3.5000  web 3.2500  code 1.5000  density 0.625 (0.50-0.75)",
        ),
        (
            TRAIN,
            "step 20/100  loss 3.2500  norm 0.875  lr 1.50e-04  density 0.500 (0.40-0.60)  12,346 tok/s  "
            "1.25 of 2.5 TFLOP/s  ETA 1:02:03",
        ),
        (
            TRAIN | {"mfu": 0.4567, "eta_seconds": 59.6, "density": [], "routed_layers": []},
            "step 20/100  loss 3.2500  norm 0.875  lr 1.50e-04  density 1.000 (1.00-1.00)  12,346 tok/s  "
            "1.25 of 2.5 TFLOP/s  MFU 45.7%  ETA 1:00",
        ),
        (
            TRAIN | {"joules_per_token": 0.01234},
            "step 20/100  loss 3.2500  norm 0.875  lr 1.50e-04  density 0.500 (0.40-0.60)  12,346 tok/s  "
            "1.25 of 2.5 TFLOP/s  0.0123 J/token  ETA 1:02:03",
        ),
    ],
)
def test_the_terminal_gets_one_readable_line(
    capsys: pytest.CaptureFixture[str], record: dict[str, Any], line: str
) -> None:
    ConsoleSink().write(record)
    assert capsys.readouterr().out == line + "\n"


def test_tensorboard_has_each_scalar_and_each_layer(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorBoardSink(tmp_path)
    for step in (20, 40):
        sink.write(TRAIN | {"step": step, "loss": 3.25 - step / 100})
    sink.write(EVAL)
    sink.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("train/loss")] == [
        (20, 3.05),
        (40, 2.85),
    ]
    assert [event.value for event in events.Scalars("eval/density/2")] == [0.75]
    dropped = {kind: events.Scalars(f"train/dropped/{kind}")[0].value for kind in ("mean", "min", "max")}
    assert dropped == {"mean": 0.0625, "min": 0.0, "max": 0.125}
    tags = set(events.Tags()["scalars"])
    assert {"train/density/1", "train/density/2", "train/learning_rate", "eval/loss"} <= tags
    assert not any(re.search("step$|kind|routed_layers", tag) for tag in tags)


def many_layers(layers: int) -> dict[str, Any]:
    """A train record of so many routed layers with all its lists."""
    lists = {name: [0.5 + layer / 1000 for layer in range(layers)] for name in ("density", *LISTS)}
    return TRAIN | lists | {"routed_layers": list(range(1, layers + 1))}


@pytest.mark.parametrize("layers", [1, 2, 192])
def test_only_densities_have_a_key_for_each_layer(layers: int) -> None:
    """All else is the same number of keys at any depth."""
    scalars = sinks._scalars(many_layers(layers))
    of_layers = {f"train/density/{layer}" for layer in range(1, layers + 1)}
    of_lists = {f"train/{name}/{kind}" for name in LISTS for kind in ("mean", "min", "max")}
    plain = {f"train/{name}" for name, value in TRAIN.items() if isinstance(value, int | float)}
    assert set(scalars) == of_layers | of_lists | plain - {"train/step"}
    assert scalars[f"train/density/{layers}"] == 0.5 + (layers - 1) / 1000
    assert scalars["train/entropy/mean"] == pytest.approx(0.5 + (layers - 1) / 2000)
    assert (scalars["train/entropy/min"], scalars["train/entropy/max"]) == (0.5, 0.5 + (layers - 1) / 1000)


def test_a_dense_run_has_no_keys_of_layers() -> None:
    dense = many_layers(0)
    assert not any("/density" in key or "/entropy" in key for key in sinks._scalars(dense))


def test_wandb_gets_the_same_scalars_and_the_step() -> None:
    logged = []
    sink = object.__new__(WandbSink)
    sink._run = SimpleNamespace(log=lambda scalars, step: logged.append((scalars, step)))
    for record in (TRAIN, ALARM):
        sink.write(record)
    assert logged == [(sinks._scalars(TRAIN), 20), ({}, 20)], "an alarm is text: for people and the JSONL"


def sinks_of(tmp_path: Path, **logging: Any) -> list[str]:
    config: RunConfig = build_config({"run_dir": str(tmp_path / "run"), "logging": logging}, source="test")
    opened = open_sinks(config)
    for sink in opened:
        sink.close()
    return [type(sink).__name__ for sink in opened]


def test_the_configuration_chooses_the_sinks(tmp_path: Path) -> None:
    assert sinks_of(tmp_path) == ["JsonlSink", "ConsoleSink"]
    pytest.importorskip("tensorboard")
    assert sinks_of(tmp_path, tensorboard=True) == ["JsonlSink", "ConsoleSink", "TensorBoardSink"]
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_records_that_storage_refuses_wait_for_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Half a line may be written before the disk is full; the next record comes after the other half."""
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    write, full = sink._file.write, OSError(28, "No space left on device")
    answers = iter([lambda text: write(text[:5]), full, full, write, write])

    def refuse(text: bytes) -> int:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return int(answer(text))

    with mock.patch.object(sink, "_file", mock.Mock(write=refuse, close=sink._file.close)):
        sink._file.name = "metrics.jsonl"
        for step in (1, 2, 3):
            sink.write({"kind": "train", "step": step})
    sink.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert capfd.readouterr().err == "warning: metrics.jsonl waits: No space left on device\n"
