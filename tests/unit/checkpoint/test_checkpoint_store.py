"""Checkpoints of one process: complete or not there at all, and damage is never read."""

import hashlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from skipmega.checkpoint.store import Checkpoint, CheckpointStore
from skipmega.config import RunConfig, build_config
from skipmega.errors import CheckpointDamagedError, CheckpointError, RunFencedError, StorageFaultError
from skipmega.parallel.grid import ParallelGrid
from skipmega.parallel.logical import LogicalTensor

ROOT = Path(__file__).resolve().parents[3]
CONFIG = build_config({"run_dir": "there", "model": {"num_layers": 4, "vocab_size": 128}}, source="test")


def tensors_of(step: int) -> dict[str, LogicalTensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weights/embedding.weight": LogicalTensor(torch.randn(6, 4, generator=generator), 0),
        "weights/layers.0.norm.weight": LogicalTensor(torch.randn(4, generator=generator), None),
        "optimizer/exp_avg/embedding.weight": LogicalTensor(torch.randn(6, 4, generator=generator), 0),
    }


def empty_like(tensors: dict[str, LogicalTensor]) -> dict[str, LogicalTensor]:
    return {name: LogicalTensor(torch.full_like(t.local, -7.0), t.dim) for name, t in tensors.items()}


def save(
    grid: ParallelGrid, folder: Path, *steps: int, keep: int = 0, config: RunConfig = CONFIG
) -> list[Path]:
    store = CheckpointStore(folder, keep)
    return [store.save(grid, config, {"step": step, "note": "x"}, tensors_of(step)) for step in steps]


def check_content(checkpoint: Checkpoint, grid: ParallelGrid, step: int) -> None:
    expected, found = tensors_of(step), empty_like(tensors_of(step))
    checkpoint.read_into(found, grid)
    for name, tensor in expected.items():
        assert torch.equal(found[name].local, tensor.local), name
    assert checkpoint.state == {"step": step, "note": "x"}
    assert checkpoint.config == CONFIG


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_read_back(grid: ParallelGrid, tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none", keep=0).latest() is None
    (path,) = save(grid, tmp_path / "new" / "folder", 100)
    assert path.name == "step-00000100"
    check_content(Checkpoint.open(path), grid, 100)
    assert names(path.parent) == ["step-00000100"], "no temporary folder remains"


def test_the_manifest_lists_every_file_with_size_and_checksum(grid: ParallelGrid, tmp_path: Path) -> None:
    (path,) = save(grid, tmp_path, 1)
    listed = json.loads((path / "manifest.json").read_text())["files"]
    found = {
        str(f.relative_to(path)): {
            "size": f.stat().st_size,
            "sha256": hashlib.sha256(f.read_bytes()).hexdigest(),
        }
        for f in path.rglob("*")
        if f.is_file()
    }
    del found["manifest.json"]
    assert listed == found


def truncate_tensors(path: Path) -> str:
    victim = next((path / "tensors").glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1])
    return victim.name


def lose_metadata(path: Path) -> str:
    (path / "tensors" / ".metadata").unlink()
    return "tensors/.metadata is missing"


def truncate_manifest(path: Path) -> str:
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    return "manifest.json is not readable"


def other_manifest(path: Path) -> str:
    (path / "manifest.json").write_text("{}")
    return "manifest.json is not readable"


def flip_a_bit(path: Path) -> str:
    victim = next((path / "tensors").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    return f"{victim.name} is not what was written (its SHA-256 differs)"


def flip_a_bit_of_the_configuration(path: Path) -> str:
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text.replace("num_layers: 4", "num_layers: 5"))
    return "config.yaml is not what was written"


@pytest.mark.parametrize("damage", [flip_a_bit, flip_a_bit_of_the_configuration])
def test_damage_inside_a_file_is_found_before_anything_is_read(
    grid: ParallelGrid, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    (path,) = save(grid, tmp_path, 10)
    problem, found = damage(path), empty_like(tensors_of(10))
    for read in (lambda: Checkpoint(path).read_into(found, grid), lambda: Checkpoint(path).read_weights()):
        with pytest.raises(CheckpointDamagedError, match=r"is damaged: .*use an earlier one") as refused:
            read()
        assert problem in str(refused.value)
    assert all((tensor.local == -7).all() for tensor in found.values())


def test_the_first_format_is_read(grid: ParallelGrid, tmp_path: Path) -> None:
    """Its manifest had sizes alone, and its temporary names no attempt."""
    (path,) = save(grid, tmp_path, 10)
    manifest = json.loads((path / "manifest.json").read_text())["files"]
    sizes = {name: entry["size"] for name, entry in manifest.items()}
    (path / "manifest.json").write_text(json.dumps({"files": sizes}))
    check_content(Checkpoint.open(path), grid, 10)


def test_too_little_space_is_seen_before_anything_is_written(grid: ParallelGrid, tmp_path: Path) -> None:
    (good,) = save(grid, tmp_path, 1)
    with (
        mock.patch("skipmega.checkpoint.store.shutil.disk_usage", return_value=mock.Mock(free=10_000)),
        pytest.raises(StorageFaultError, match=r"it needs 0\.0 MB, 0 MB are free; the last good .*00001$"),
    ):
        save(grid, tmp_path, 2)
    assert names(tmp_path) == [good.name]


def test_those_of_every_so_many_steps_are_kept_too(grid: ParallelGrid, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1, keep_every=10)
    for step in (5, 10, 15, 20, 25):
        store.save(grid, CONFIG, {"step": step}, tensors_of(step))
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000025"]


def test_a_newer_attempt_s_temporary_folder_is_left_alone(grid: ParallelGrid, tmp_path: Path) -> None:
    (tmp_path / "step-00000009.3.tmp").mkdir()
    store = CheckpointStore(tmp_path, keep=1)
    store.save(grid, CONFIG, {"step": 8}, tensors_of(8), attempt=2)
    assert names(tmp_path) == ["step-00000008", "step-00000009.3.tmp"]


@pytest.mark.parametrize("passes", [0, 1])
def test_a_save_that_was_overtaken_leaves_nothing(grid: ParallelGrid, tmp_path: Path, passes: int) -> None:
    """Whether the newer attempt came before it began or while it was writing."""
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) > passes:
            raise RunFencedError("attempt 2 has taken over")

    with pytest.raises(RunFencedError, match="attempt 2 has taken over"):
        CheckpointStore(tmp_path, keep=1).save(
            grid, CONFIG, {"step": 8}, tensors_of(8), attempt=1, check_fence=check
        )
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "moment", ["shutil.disk_usage", "write_tensors", "written_by", "dump_config", "manifest.write_manifest"]
)
def test_a_save_whose_folder_was_taken_away_leaves_the_run_to_the_newer_attempt(
    grid: ParallelGrid, tmp_path: Path, moment: str
) -> None:
    """Stopped anywhere and woken up later: what a newer attempt took away is no fault of the storage."""
    store, overtaken = CheckpointStore(tmp_path, keep=1), False
    module, _, name = f"skipmega.checkpoint.store.{moment}".rpartition(".")
    work = getattr(pkgutil.resolve_name(module), name)

    def sleep_before(*args: object) -> object:
        nonlocal overtaken
        if not overtaken:
            overtaken = True
            store.remove_unfinished(1)
        return work(*args)

    def check() -> None:
        if overtaken:
            raise RunFencedError("attempt 2 has taken over")

    with mock.patch(f"{module}.{name}", sleep_before), pytest.raises(RunFencedError, match="attempt 2"):
        store.save(grid, CONFIG, {"step": 8}, tensors_of(8), attempt=1, check_fence=check)
    assert names(tmp_path) == []


def test_a_save_whose_folder_was_taken_away_at_last_never_gets_its_final_name(
    grid: ParallelGrid, tmp_path: Path
) -> None:
    """A newer attempt comes after the last look for one and is seen in what fails."""
    store, looks = CheckpointStore(tmp_path, keep=1), iter([False, True])

    def check() -> None:
        match next(looks, None):
            case True:
                store.remove_unfinished(1)
            case None:
                raise RunFencedError("attempt 2 has taken over")

    with pytest.raises(RunFencedError, match="attempt 2"):
        store.save(grid, CONFIG, {"step": 8}, tensors_of(8), attempt=1, check_fence=check)
    assert names(tmp_path) == []


@pytest.mark.parametrize("damage", [truncate_tensors, lose_metadata, truncate_manifest, other_manifest])
def test_damage_is_passed_over_and_named(
    grid: ParallelGrid, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    good, bad = save(grid, tmp_path, 9, 10)
    problem = damage(bad)
    assert CheckpointStore(tmp_path, keep=0).latest() == Checkpoint(good)
    check_content(Checkpoint.open(tmp_path), grid, 9)
    with pytest.raises(CheckpointError, match=r"is damaged: .*use an earlier one") as refused:
        Checkpoint.open(bad)
    assert str(bad) in str(refused.value)
    assert problem in str(refused.value)


def test_what_was_never_finished_is_passed_over(grid: ParallelGrid, tmp_path: Path) -> None:
    good, unfinished, renamed_early = save(grid, tmp_path, 1, 2, 3)
    (unfinished / "manifest.json").unlink()
    renamed_early.rename(renamed_early.with_name(renamed_early.name + ".tmp"))
    (tmp_path / "step-note.txt").write_text("not a folder")
    assert CheckpointStore(tmp_path, keep=0).latest() == Checkpoint(good)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        Checkpoint.open(unfinished)


def test_what_killed_saves_left_is_removed_by_the_next_and_does_not_leak_into_it(
    grid: ParallelGrid, tmp_path: Path
) -> None:
    killed = tmp_path / "step-00000004.tmp"
    killed.mkdir()
    left_over = tmp_path / "step-00000005.tmp" / "tensors"
    left_over.mkdir(parents=True)
    (left_over / "__9_0.distcp").write_bytes(b"half a tensor")
    assert CheckpointStore(tmp_path, keep=0).latest() is None
    assert names(tmp_path) == ["step-00000004.tmp", "step-00000005.tmp"], "looking removes nothing"
    (path,) = save(grid, tmp_path, 5)
    assert names(tmp_path) == ["step-00000005"]
    assert not (path / "tensors" / "__9_0.distcp").exists()
    check_content(Checkpoint.open(path), grid, 5)


def test_saving_a_step_again_replaces_it(grid: ParallelGrid, tmp_path: Path) -> None:
    """As a damaged one is, when a resumed run comes by the same step."""
    (path,) = save(grid, tmp_path, 5)
    truncate_tensors(path)
    assert save(grid, tmp_path, 5) == [path]
    check_content(Checkpoint.open(path), grid, 5)


@pytest.mark.parametrize(
    ("keep", "left"), [(0, [2, 9, 10, 100]), (1, [100]), (3, [9, 10, 100]), (7, [2, 9, 10, 100])]
)
def test_the_newest_are_kept(grid: ParallelGrid, tmp_path: Path, keep: int, left: list[int]) -> None:
    save(grid, tmp_path, 2, 9, 10, 100, keep=keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]


def test_damaged_ones_do_not_count_as_kept(grid: ParallelGrid, tmp_path: Path) -> None:
    """With keep=2, a damaged newest one must not push the last good ones out."""
    _, _, third = save(grid, tmp_path, 1, 2, 3, keep=3)
    truncate_tensors(third)
    save(grid, tmp_path, 4, keep=2)
    newest = CheckpointStore(tmp_path, keep=2).latest()
    assert newest is not None
    assert newest.path.name == "step-00000004"
    assert {"step-00000002", "step-00000004"} <= set(names(tmp_path))
    assert "step-00000001" not in names(tmp_path)


def test_a_run_folder_or_a_folder_of_checkpoints_opens_at_its_newest(
    grid: ParallelGrid, tmp_path: Path
) -> None:
    *_, newest = save(grid, tmp_path / "run" / "checkpoints", 9, 10)
    for path in (newest, tmp_path / "run" / "checkpoints", tmp_path / "run"):
        assert Checkpoint.open(path) == Checkpoint(newest)
        assert Checkpoint.open(str(path)) == Checkpoint(newest)


def test_what_holds_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("")
    for path in (tmp_path, tmp_path / "gone", file):
        with pytest.raises(
            CheckpointError, match="holds no complete checkpoint: give a checkpoint folder"
        ) as refused:
            Checkpoint.open(path)
        assert str(path) in str(refused.value)


def test_another_architecture_s_tensors_are_refused_with_the_checkpoint_s_name(
    grid: ParallelGrid, tmp_path: Path
) -> None:
    (path,) = save(grid, tmp_path, 1)
    missing = {"weights/other.weight": LogicalTensor(torch.zeros(2), None)}
    reshaped = {"weights/embedding.weight": LogicalTensor(torch.zeros(8, 4), 0)}
    for tensors, named in ((missing, "other.weight"), (reshaped, "embedding.weight")):
        with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*step-00000001") as refused:
            Checkpoint(path).read_into(tensors, grid)
        assert named in str(refused.value)


FAILING_SAVES = """
import resource, signal, sys, torch
from pathlib import Path
from skipmega.checkpoint.store import CheckpointStore
from skipmega.config import build_config
from skipmega.errors import CheckpointDamagedError, CheckpointError, RunFencedError, StorageFaultError
from skipmega.parallel.process import ProcessInfo
from skipmega.parallel.grid import create_grid
from skipmega.parallel.logical import LogicalTensor

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails with EFBIG
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
grid = create_grid(ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="none"))

def save(store, step, elements, sources, limit=unlimited):
    config = build_config({"data": {"train": [{"path": "p" * 100}] * sources}}, source="test")
    tensors = {"weights/w": LogicalTensor(torch.ones(elements), None)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited))
    try:
        return store.save(grid, config, {"step": step}, tensors).name
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))

for name, large in {"tensors": (100_000, 1), "configuration": (10, 1000)}.items():
    store = CheckpointStore(Path(sys.argv[1]) / name, keep=1)
    print(save(store, 1, *large, limit=65536))
    print(save(store, 2, 10, 1))
    print(save(store, 3, *large, limit=65536))
    assert not list(store.folder.glob("*.tmp")), "a failed save frees the space it took"
    print(store.latest().path.name)
    print(save(store, 4, *large))
"""


@pytest.fixture(scope="module")
def failing_saves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Saves whose writes really fail, in a process with a file size limit: their folder, what they said."""
    folder = tmp_path_factory.mktemp("failing")
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAILING_SAVES, str(folder)],
        check=True, capture_output=True, text=True, timeout=200, cwd=ROOT,
        env=inherited | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return folder, done.stdout.splitlines()[-10:]


@pytest.mark.parametrize(
    ("large", "lines", "cause"),
    [
        ("tensors", slice(0, 5), "process 0: File too large ("),
        ("configuration", slice(5, 10), "File too large"),
    ],
)
def test_a_failed_write_is_an_error_that_names_the_last_good_checkpoint(
    failing_saves: tuple[Path, list[str]], large: str, lines: slice, cause: str
) -> None:
    """In the tensors, and after them in the files that make a checkpoint complete."""
    folder = failing_saves[0] / large
    first, between, later, latest, last = failing_saves[1][lines]
    assert first.startswith(f"could not save checkpoint {folder / 'step-00000001'}: {cause}")
    assert first.endswith("; there is no earlier checkpoint")
    assert between == latest == "step-00000002"
    assert later.startswith(f"could not save checkpoint {folder / 'step-00000003'}: {cause}")
    assert later.endswith(f"; the last good checkpoint is {folder / 'step-00000002'}")
    assert last == "step-00000004", "the store goes on once there is space"
    assert names(folder) == ["step-00000004"]


def test_a_folder_that_cannot_be_made_is_an_error_by_name(grid: ParallelGrid, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(
        CheckpointError, match=r"could not save checkpoint .*step-00000001: .*no earlier checkpoint"
    ):
        save(grid, tmp_path / "checkpoints", 1)


def test_a_checkpoint_can_be_moved(grid: ParallelGrid, tmp_path: Path) -> None:
    (path,) = save(grid, tmp_path / "here", 6)
    moved = Path(shutil.move(path, tmp_path / "elsewhere"))
    check_content(Checkpoint.open(moved), grid, 6)
