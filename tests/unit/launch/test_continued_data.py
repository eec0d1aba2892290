"""A run goes on with the data it began with; samples may be left out as long as it has not read them."""

import json
from pathlib import Path

import pytest

from skipmega.config import RunConfig, build_config, dump_config
from skipmega.errors import CheckpointError, DataError
from skipmega.launch.run_folder import RunFolder


def make_config(run_dir: Path, leave_out: list[list[int]]) -> RunConfig:
    data = {"tokenizer": "t.model", "train": [{"path": "a"}], "order": "stream", "leave_out": leave_out}
    return build_config({"run_dir": str(run_dir), "model": {"vocab_size": 256}, "data": data}, source="test")


def check(run_dir: Path, there: list[list[int]], here: list[list[int]]) -> None:
    """Continue with ``here`` what has read 100 samples with ``there``."""
    path = run_dir / "checkpoints" / "step-00000010"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_config(make_config(run_dir, there)))
    (path / "state.json").write_text(json.dumps({"step": 10, "consumed_samples": 100}))
    sizes = {name: (path / name).stat().st_size for name in ("config.yaml", "state.json")}
    (path / "manifest.json").write_text(json.dumps({"files": sizes}))
    folder = RunFolder(make_config(run_dir, here))
    folder.begin_records(10)
    folder.check()


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ([], [[100, 120]]),
        ([[100, 120]], []),
        ([[20, 29]], [[20, 29], [110, 110]]),
        ([[20, 29]], [[20, 24], [25, 29]]),
    ],
)
def test_what_is_still_to_come_may_be_left_out(
    tmp_path: Path, there: list[list[int]], here: list[list[int]]
) -> None:
    check(tmp_path / "run", there, here)


@pytest.mark.parametrize(
    ("there", "here", "read"),
    [([], [[99, 120]], 99), ([[20, 29]], [], 109), ([[20, 29]], [[20, 29], [100, 105]], 109)],
)
def test_what_was_read_stays_read(
    tmp_path: Path, there: list[list[int]], here: list[list[int]], read: int
) -> None:
    with pytest.raises(CheckpointError, match=rf"has read the samples up to {read}, and data\.leave_out="):
        check(tmp_path / "run", there, here)


def test_other_data_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(make_config(tmp_path / "run", []))
    for known in (None, "first"):
        folder.check_data(known)
        folder.record_data(known)
    folder.check_data("first")
    with pytest.raises(DataError, match=r"began with other data: the SHA-256 .* is second now and was first"):
        folder.check_data("second")
