"""The history that a metrics file tells, through crashes and resumes."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from skipmega.errors import DataError
from skipmega.inspection import read_metrics


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def start(step: int) -> dict[str, Any]:
    return {"kind": "start", "step": step, "attempt": 1}


def train(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss, "tokens": step * 10}


def test_what_a_resume_repeats_is_told_once(tmp_path):
    evaluation = {"kind": "eval", "step": 4, "loss": 9.0}
    path = write(
        tmp_path / "metrics.jsonl",
        *[start(0), train(2, 5.0), train(4, 4.0), evaluation, train(6, 3.0), train(8, 2.5)],
        *[start(4), train(6, 3.1), evaluation | {"step": 6}],
        *[start(6), train(7, 2.9)],
    )
    metrics = read_metrics(path)
    assert [(record["step"], record["loss"]) for record in metrics.train] == [
        (2, 5.0),
        (4, 4.0),
        (6, 3.1),
        (7, 2.9),  # step 8 of the first attempt led nowhere
    ]
    assert [record["step"] for record in metrics.evaluations] == [4, 6]
    assert metrics.resumed_at == [4, 6]


def test_alarms_are_no_records_of_a_step(tmp_path):
    """The lists that a record has beside the density are handed on as they are."""
    lists = {"density": [0.5], "routed_layers": [1], "padded": [0.25], "rank_imbalance": [1.5]}
    alarm = {"kind": "alarm", "step": 2, "message": "layer 1 is dead"}
    records = [train(1, 5.0) | lists, train(2, 4.0) | lists, alarm]
    metrics = read_metrics(write(tmp_path / "metrics.jsonl", start(0), *records))
    assert metrics.train == records[:2]
    assert metrics.evaluations == []
    assert metrics.routed() == records[:2]


def test_half_a_line_is_skipped_with_a_warning(tmp_path, caplog):
    path = write(tmp_path / "metrics.jsonl", train(1, 5.0))
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"kind": "train", "st\n' + json.dumps(train(2, 4.0)) + '\n{"kind": "tr')
    with caplog.at_level(logging.WARNING):
        assert [record["step"] for record in read_metrics(path).train] == [1, 2]
    assert "line 2 is not JSON" in caplog.text
    assert "line 4 is not JSON" in caplog.text


def test_only_records_of_the_last_routed_layers_count(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl",
        train(1, 5.0) | {"density": [0.5], "routed_layers": [1]},
        train(2, 4.0) | {"density": [0.5, 0.4], "routed_layers": [1, 2]},
        train(3, 4.0) | {"density": [], "routed_layers": []},
    )
    assert [record["step"] for record in read_metrics(path).routed()] == [2]


def test_what_is_no_metrics_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot read metrics file"):
        read_metrics(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no record of a training step"):
        read_metrics(write(tmp_path / "metrics.jsonl", start(0)))
