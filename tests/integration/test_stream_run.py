"""A real run of the order ``stream``: two sources, two stages, samples left out, stopped and resumed."""

from pathlib import Path

import pytest
import yaml

from skipmega.config import load_config
from skipmega.data.pairs.arrangement import Arrangement, arrange
from skipmega.launch.run import build_data, resolve
from support.tiny_run import HALF, STEPS, pretrain_each, records
from support.worlds import run_world


@pytest.fixture(scope="module")
def stream_config(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = yaml.safe_load(tiny_config.read_text())
    data = Path(values["data"]["tokenizer"]).parent
    values["data"] |= {
        "order": "stream",
        "train": [
            {"path": f"{data}/data", "name": "a"},
            {"path": f"{data}/data-v*", "name": "b", "weight": 0.2},
        ],
        "valid": [{"path": f"{data}/data-valid", "name": "c"}, {"path": f"{data}/data", "name": "d"}],
        "stages": [{"from_tokens": 64 * 8 * 3, "weights": {"b": 1.0}}],
        "leave_out": [[4, 9]],
    }
    path = tmp_path_factory.mktemp("stream") / "stream.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_stopped_on_one_rank_resumed_on_two(stream_config: Path, tmp_path: Path) -> None:
    whole, cut = f"run_dir={tmp_path}/whole", f"run_dir={tmp_path}/cut"
    run_world(pretrain_each, 1, stream_config, [[whole], [cut, f"training.stop_after={HALF}"]])
    run_world(pretrain_each, 2, stream_config, [[cut, "training.micro_batch_size=2"]])
    expected, found = (records(tmp_path / name, "train") for name in ("whole", "cut"))
    assert list(expected) == list(found) == list(range(1, STEPS + 1))
    for step, record in expected.items():
        assert found[step]["loss"] == pytest.approx(record["loss"], rel=1e-5), step
    for step, record in records(tmp_path / "whole", "eval").items():
        assert set(record["source_loss"]) == {"c", "d"}
        assert records(tmp_path / "cut", "eval")[step]["source_loss"] == pytest.approx(
            record["source_loss"], rel=1e-5
        )
        assert record["loss"] == pytest.approx(sum(record["source_loss"].values()) / 2, rel=0.1)


def test_a_run_on_packed_samples(stream_config: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(stream_config.read_text())
    pair, length = values["data"]["train"][0]["path"], values["data"]["sequence_length"]
    arrange(Arrangement((pair,), tmp_path / "packed", sequence_length=length), 1)
    values["data"] |= {"train": [{"path": f"{tmp_path}/packed"}], "valid": [], "stages": [], "leave_out": []}
    values["data"]["split"] = [3.0, 1.0]
    config = tmp_path / "packed.yaml"
    config.write_text(yaml.safe_dump(values))
    run_world(pretrain_each, 1, config, [[f"run_dir={tmp_path}/run"]])
    train, held_out = (records(tmp_path / "run", kind) for kind in ("train", "eval"))
    assert list(train) == list(range(1, STEPS + 1))
    assert held_out[STEPS]["loss"] < train[1]["loss"]
    resolved, tokenizer = resolve(load_config(config), 1)
    samples = build_data(resolved, tokenizer).train
    learnt = [
        float(samples[n]["loss_mask"].mean()) for n in range(STEPS * resolved.training.global_batch_size)
    ]
    padding = [train[step]["padding"] for step in train]
    assert 0 < sum(padding) / STEPS == pytest.approx(1 - sum(learnt) / len(learnt), abs=1e-6)
