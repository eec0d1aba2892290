"""Records become targets: by hand, with rows missing, and as files."""

import json
from pathlib import Path
from typing import Any

import pytest

from skipmega.experiments.speed.targets import Result, results, write_report

ABOUT = {"device": "toy", "versions": "torch 0", "commit": "abc", "date": "2026-01-01"}


def record(mode: str, row: str, seconds: float, flops: float = 1.0, **more: Any) -> dict[str, Any]:
    times = {"seconds": seconds, "fastest": seconds, "slowest": seconds}
    return {"mode": mode, "row": row, **times, "flops": flops, **ABOUT, **more}


def found(records: list[dict[str, Any]], name: str) -> Result:
    (result,) = [row for row in results(records) if row.name.startswith(name)]
    return result


def test_efficiency_is_time_saved_over_operations_saved() -> None:
    records = [record("layer", "GQA dense", 10.0, 8.0), record("layer", "GQA 0.25", 4.0, 2.0)]
    result = found(records, "efficiency of skipping, GQA, layer stack, P=0.25")
    assert result.value == pytest.approx(10 / 4 * 2 / 8)
    assert (result.must, result.aim, result.verdict) == (0.78, 0.87, "MISSED")


@pytest.mark.parametrize(("seconds", "verdict"), [(1.02, "aim"), (1.05, "must"), (1.1, "MISSED")])
def test_a_bound_from_above(seconds: float, verdict: str) -> None:
    records = [
        record("step", "MHA dense", 1.0, 2.0),
        record("step", "MHA 0.5, twice as many layers", seconds, 2.0),
    ]
    result = found(records, "twice the layers")
    assert (result.value, result.verdict) == (pytest.approx(seconds), verdict)


def test_the_rest_of_the_table_by_hand() -> None:
    records = [
        record("step", "own, bf16 weights", 1.0, tokens_per_second=120.0),
        record("step", "Hugging Face, bf16 weights", 1.0, tokens_per_second=100.0),
        record("attention", "MHA causal 8192", 4.0),
        record("attention", "MHA packed 8192", 2.4),
        record("layer", "MHA dense", 1.0, 10.0, activation_bytes=100),
        record("layer", "MHA 0.125", 1.0, 3.0, activation_bytes=33),
        record("layer", "own mixture-of-depths 0.5", 3.0),
        record("peers", "mixture-of-depths 0.5", 4.0),
    ]
    assert found(records, "dense tokens/s over Hugging Face's, bf16").value == pytest.approx(1.2)
    assert found(records, "packed attention at P=0.5 over P x causal, MHA, 8192").value == pytest.approx(1.2)
    memory = found(records, "activation memory against dense over FLOPs ratio, MHA, P=0.125")
    assert memory.value == pytest.approx(0.33 / 0.3)
    assert found(records, "own Mixture-of-Depths router over the plain one, time, P=0.5").value == 0.75


def test_only_the_best_peer_counts_and_missing_ones_are_named() -> None:
    records = [
        record("peers", "dense", 10.0, 10.0),
        record("peers", "own 0.5", 5.0, 4.5),
        record("peers", "masked 0.5", 10.0, 4.5),
        record("peers", "mixture-of-depths 0.5", 5.0, 4.0),
    ]
    result = found(records, "efficiency minus the best peer's, P=0.5")
    assert result.value == pytest.approx(0.9 - 0.8)
    assert "not measured: packed" in result.note


def test_what_has_no_record_is_said_to_be_unmeasured(tmp_path: Path) -> None:
    records = [record("layer", "MHA dense", 1.0, 10.0)]
    assert {row.verdict for row in results(records)} == {"not measured"}
    assert "not measured" in write_report(records, tmp_path)
    assert not (tmp_path / "targets.png").exists()


def test_the_report_is_a_table_numbers_and_a_figure(tmp_path: Path) -> None:
    records = [record("layer", "MHA dense", 1.0, 10.0), record("layer", "MHA 0.5", 0.6, 5.0)]
    text = write_report(records, tmp_path)
    assert "device: toy" in text
    assert "0.833" in (tmp_path / "table.md").read_text()
    numbers = json.loads((tmp_path / "targets.json").read_text())
    assert numbers["commit"] == ["abc"]
    assert [row["value"] for row in numbers["targets"] if row["value"]] == [pytest.approx(0.5 / 0.6)]
    assert (tmp_path / "targets.png").stat().st_size > 1000
