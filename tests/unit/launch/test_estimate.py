"""What a run is said to cost."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from small_runs import (
    DENSE,
    HIDDEN,
    LAYER,
    MATRICES,
    ROOT,
    TABLE,
    make_config,
)

from skipmega.data.tokenizer import train_tokenizer
from skipmega.errors import ConfigError
from skipmega.launch.estimate import (
    Estimate,
    estimate,
    with_vocabulary,
)
from skipmega.models.flops import count_parameters, training_flops_per_token


def test_the_whole_account_of_a_small_run() -> None:
    config = make_config(routing={"density": 0.25})
    result = estimate(config, processes=2, mfu=0.5, peak_tflops=100.0)
    routers = 2 * 2 * HIDDEN
    assert (result.name, result.layers, result.grid) == ("runs/small", 4, "TP1 PP1 DP2 ZeRO-1")
    assert result.layer_parameters == 4 * LAYER + routers
    assert result.embedding_parameters == TABLE
    assert result.parameters == 4 * LAYER + routers + TABLE + HIDDEN == count_parameters(config)
    idle = 2 * 0.75 * (MATRICES - 2 * HIDDEN**2)  # keys and values are made for all
    assert result.active_parameters == result.parameters - idle
    assert result.effective_depth == 2.5
    assert result.executed_flops == training_flops_per_token(config, {1: 0.25, 2: 0.25})
    assert result.dense_flops == training_flops_per_token(config)
    assert result.tokens == 10 * 64 * 16
    assert result.seconds == pytest.approx(10 * 64 * 16 * result.executed_flops / (2 * 100e12 * 0.5))


@pytest.mark.parametrize(
    ("routing", "depth"),
    [
        ({"router": "always"}, 4.0),
        ({"router": "never"}, 2.0),
        ({"router": "highway", "density": 0.5}, 4.0),
        ({"router": "random", "density": [0.5, 0.25]}, 2.75),
        ({"density": {"first": 0.1, "last": 0.3}, "dense_last": 0}, 1 + 0.6),
    ],
)
def test_the_effective_depth_is_the_sum_of_densities(routing: dict[str, Any], depth: float) -> None:
    assert estimate(make_config(routing=routing)).effective_depth == pytest.approx(depth)


@pytest.mark.parametrize(
    ("parallel", "text"),
    [
        ({}, "TP1 PP1 DP8 ZeRO-1"),
        (
            {"tensor_parallel": 2, "sequence_parallel": True, "context_parallel": 2, "zero_stage": 2},
            "TP2 SP CP2 PP1 DP2 ZeRO-2",
        ),
        ({"pipeline_parallel": 2, "chunks_per_stage": 2}, "TP1 PP2 (2 chunks) DP4 ZeRO-1"),
        ({"context_parallel": 4, "tensor_parallel": 2}, "TP2 CP4 PP1 DP1 ZeRO-1"),
    ],
)
def test_the_grid_in_a_line(parallel: dict[str, Any], text: str) -> None:
    assert estimate(make_config(routing=DENSE, parallel=parallel), processes=8).grid == text


def test_the_vocabulary_is_the_configuration_s_or_else_the_tokenizer_s(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    data = {"tokenizer": str(path)}
    unknown = make_config(model={"vocab_size": None}, data=data)
    with pytest.raises(ConfigError) as refused:
        estimate(unknown)
    for part in ("model.vocab_size is not set", f"data.tokenizer={path} is not there", "vocab_size=32000"):
        assert part in str(refused.value)
    with pytest.raises(ConfigError, match=r"data\.tokenizer is not set"):
        estimate(make_config(model={"vocab_size": None}))
    train_tokenizer(["some words and some other words " * 20], path, 300)
    assert with_vocabulary(unknown).vocab_size == 384
    assert with_vocabulary(make_config(model={"vocab_size": 200}, data=data)).vocab_size == 256


@pytest.mark.parametrize(
    "wrong",
    [{"processes": 0}, {"mfu": 0.0}, {"mfu": 1.5}, {"peak_tflops": 0.0}, {"peak_tflops": float("nan")}],
)
def test_impossible_devices_are_refused(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name}={value}.*at least 1 process"):
        estimate(make_config(), **wrong)


def test_a_grid_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.global_batch_size=64 is not a multiple"):
        estimate(make_config(), processes=3)


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("estimate_script", ROOT / "tools/estimate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAPER = ROOT / "pretrain/configs/paper"


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["estimate.py", *arguments])
    script.main()


def test_one_configuration_is_described(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(script, monkeypatch, str(PAPER / "eff6_d125.yaml"), "model.num_layers=24", "--processes", "8")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "eff6_d125"
    told = {line.split("  ")[1]: line for line in lines[1:] if not line.startswith("    ")}
    assert set(told) == {"parameters", "Eff-L", "FLOPs", "memory", "tokens", "time"}
    assert "3.00 of 24 layers" in told["Eff-L"]
    assert "on 8 x 989 TFLOP/s at MFU 40%" in told["time"]


def test_several_make_a_table_relative_to_the_first(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(PAPER / f"{name}.yaml") for name in ("dense_6", "eff6_d500", "wide_ffn_eff6_d500")]
    run(script, monkeypatch, *files, "--mfu", "0.2", "training.steps=1000", "--processes", "2")
    heading, *rows = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in (heading, *rows)}) == 1, "columns line up"
    at = heading.index("rel")
    relative = {row.split()[0]: row[: at + 3].split()[-1] for row in rows}
    assert relative == {"dense_6": "1.000", "eff6_d500": "1.083", "wide_ffn_eff6_d500": "1.083"}
    run(script, monkeypatch, *files, "--mfu", "0.2", "training.steps=1000", "--processes", "2", "--json")
    first, *others = json.loads(capsys.readouterr().out)
    assert set(first) == {*Estimate.__dataclass_fields__}
    assert first["tokens"] == 1000 * 256 * 1024
    assert first["memory"]["total"] > first["memory"]["weights"] > 0
    for other in others:
        assert other["executed_flops"] / first["executed_flops"] == pytest.approx(1.083, abs=5e-4)
        assert other["seconds"] == pytest.approx(
            1000 * 256 * 1024 * other["executed_flops"] / (2 * 989e12 * 0.2)
        )


def test_overrides_alone_are_no_configuration(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(script, monkeypatch, "model.num_layers=3")
    assert "name at least one configuration file" in capsys.readouterr().err
