"""A run's folder: one run each, continued when it is the same run, refused when it is not."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from skipmega.checkpoint.store import Checkpoint
from skipmega.config import RunConfig, build_config, dump_config
from skipmega.errors import CheckpointError, RunFencedError
from skipmega.launch.run_folder import RunFolder


def make_config(run_dir: Path, **sections: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {"num_layers": 4, "vocab_size": 256},
        "data": {"tokenizer": "t.model", "train": [{"path": "a"}]},
    }
    for section, fields in sections.items():
        values[section] = values.get(section, {}) | fields
    return build_config(values, source="test")


def put_checkpoint(folder: Path, config: RunConfig, step: int) -> Path:
    """A complete checkpoint of no tensors, as far as finding and comparing it goes."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_config(config))
    (path / "state.json").write_text(json.dumps({"step": step}))
    sizes = {name: (path / name).stat().st_size for name in ("config.yaml", "state.json")}
    (path / "manifest.json").write_text(json.dumps({"files": sizes}))
    return path


def start(config: RunConfig, step: int) -> int:
    folder = RunFolder(config)
    attempt = folder.claim_attempt()
    folder.begin_records(step)
    return attempt


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a run that has reached step 20."""
    path = tmp_path / "run"
    config = make_config(path)
    start(config, step=0)
    for step in (10, 20):
        put_checkpoint(path / "checkpoints", config, step)
    return path


def test_checking_a_new_folder_writes_nothing(tmp_path: Path) -> None:
    for resume in ("auto", "never"):
        assert RunFolder(make_config(tmp_path / "new", checkpoint={"resume": resume})).check() is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    assert RunFolder(make_config(tmp_path / "empty")).check() is None


def test_sample_indices_of_a_start_that_failed_are_nothing_foreign(tmp_path: Path) -> None:
    folder = RunFolder(make_config(tmp_path / "run"))
    folder.index_cache.mkdir(parents=True)
    folder.claim_attempt()
    assert folder.check() is None


def test_a_file_in_the_folder_s_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match=r"holds no run \(found a file called run\): choose another"):
        RunFolder(make_config(tmp_path / "run")).check()
    with pytest.raises(CheckpointError, match=r"cannot write run_dir=.*run/below: Not a directory; make it"):
        RunFolder(make_config(tmp_path / "run" / "below")).claim_attempt()


def test_auto_continues_from_the_newest(run_dir: Path) -> None:
    found = RunFolder(make_config(run_dir)).check()
    assert found == Checkpoint(run_dir / "checkpoints" / "step-00000020")
    assert found.state["step"] == 20


def test_auto_starts_over_when_nothing_was_saved_yet(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    start(config, step=0)
    assert RunFolder(config).check() is None


def test_attempts_are_counted_and_the_configuration_kept(run_dir: Path) -> None:
    config = make_config(run_dir, optimizer={"learning_rate": 0.5})
    assert [start(config, step=20) for _ in range(2)] == [2, 3]
    assert (run_dir / "config.yaml").read_text() == dump_config(config)


def test_of_attempts_that_claim_at_once_each_gets_a_number_of_its_own(tmp_path: Path) -> None:
    folder = RunFolder(make_config(tmp_path / "run"))
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: folder.claim_attempt(), range(32)))
    assert sorted(numbers) == list(range(1, 33))


def test_the_newest_attempt_owns_the_run_and_names_itself_to_the_older(run_dir: Path) -> None:
    folder = RunFolder(make_config(run_dir))
    folder.check_owned(1)
    assert folder.claim_attempt() == 2
    folder.check_owned(2)
    with pytest.raises(
        RunFencedError,
        match=rf"attempt 2 \(host .*, process {os.getpid()}\) has taken over run_dir={run_dir}; attempt 1",
    ):
        folder.check_owned(1)


def test_claiming_takes_away_what_older_attempts_are_still_saving(run_dir: Path) -> None:
    checkpoints = run_dir / "checkpoints"
    for name in ("step-00000030.1.tmp", "step-00000030.7.tmp", "step-00000030.tmp"):
        (checkpoints / name).mkdir()
    assert RunFolder(make_config(run_dir)).claim_attempt() == 2
    assert sorted(entry.name for entry in checkpoints.iterdir()) == [
        "step-00000010",
        "step-00000020",
        "step-00000030.7.tmp",
    ]


def test_records_beyond_the_step_it_starts_from_are_dropped(run_dir: Path) -> None:
    """With those torn by a full disk or a kill; an older attempt that is still writing writes to nowhere."""
    metrics = run_dir / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step}) + "\n" for step in (10, 20, 30)]
    metrics.write_text("".join(lines) + '{"kind": "train", "st')
    with metrics.open("a") as older:
        RunFolder(make_config(run_dir)).begin_records(20)
        older.write("of an older attempt")
    assert metrics.read_text() == "".join(lines[:2])


def test_all_that_were_complete_are_candidates_newest_first(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step-00000020" / "manifest.json").write_text("")
    found = RunFolder(make_config(run_dir)).candidates()
    assert [checkpoint.path.name for checkpoint in found] == ["step-00000020", "step-00000010"]


def test_never_refuses_a_run_that_is_there(run_dir: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"checkpoint\.resume=never, but run_dir=.* already holds a run"
    ):
        RunFolder(make_config(run_dir, checkpoint={"resume": "never"})).check()


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, resume: str) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(
        CheckpointError, match=r"not empty and holds no run \(found thesis\.tex\): choose another"
    ):
        RunFolder(make_config(tmp_path, checkpoint={"resume": resume})).check()


@pytest.mark.parametrize(
    ("section", "field", "value", "there"),
    [
        ("model", "hidden_size", 1536, "768"),
        ("model", "tie_embeddings", False, "True"),
        ("routing", "router", "always", "'quantile'"),
        ("routing", "dense_first", 0, "1"),
        ("routing", "dense_last", 2, "1"),
        ("routing", "every", 2, "1"),
        ("routing", "wrap", "attention", "'layer'"),
        ("routing", "keys_values", "executed", "'all'"),
        ("routing", "router_input", "raw", "'normed'"),
        ("routing", "router_bias", True, "False"),
        ("routing", "stand_in", "predictor", "'score'"),
        ("optimizer", "name", "adafactor", "'adamw'"),
        ("data", "tokenizer", "u.model", "'t.model'"),
        ("data", "train", [{"path": "b"}], r"\[DataSource\(path='a', weight=1.0, .*\)\]"),
        ("data", "sequence_length", 512, "1024"),
        ("training", "seed", 1, "1234"),
    ],
)
def test_another_run_is_refused_by_the_field_that_differs(
    run_dir: Path, section: str, field: str, value: Any, there: str
) -> None:
    config = make_config(run_dir, **{section: {field: value}})
    with pytest.raises(CheckpointError, match=rf"holds another run: {section}\.{field} is {there} there and"):
        RunFolder(config).check()


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("training", "steps", 2000),
        ("training", "stop_after", 30),
        ("training", "micro_batch_size", 1),
        ("parallel", "tensor_parallel", 2),
        ("optimizer", "learning_rate", 0.5),
        ("routing", "density", 0.25),
        ("routing", "eval_density", {"first": 0.25, "last": 0.5}),
        ("routing", "eval_density", 0.25),
        ("routing", "update_weight", "score"),
        ("routing", "group_size", 64),
        ("routing", "router_learning_rate", 2.0),
        ("logging", "interval", 1),
    ],
)
def test_what_a_run_may_change_it_may_change(run_dir: Path, section: str, field: str, value: Any) -> None:
    found = RunFolder(make_config(run_dir, **{section: {field: value}})).check()
    assert found is not None
    assert found.path.name == "step-00000020"


def test_a_named_checkpoint_starts_a_new_run_of_the_same_architecture(run_dir: Path, tmp_path: Path) -> None:
    """Its data and seed may differ: that is what fine-tuning from it is."""
    origin = run_dir / "checkpoints" / "step-00000010"
    new = {"checkpoint": {"resume": str(origin)}, "training": {"seed": 5}, "data": {"train": []}}
    assert RunFolder(make_config(tmp_path / "second", **new)).check() == Checkpoint(origin)
    with pytest.raises(
        CheckpointError, match=r"step-00000010 holds another run: model\.num_layers is 4 there and 6"
    ):
        RunFolder(make_config(tmp_path / "second", **new, model={"num_layers": 6})).check()


def test_a_named_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", checkpoint={"resume": str(tmp_path / "gone")})
    with pytest.raises(CheckpointError, match=r"gone holds no complete checkpoint"):
        RunFolder(config).check()
