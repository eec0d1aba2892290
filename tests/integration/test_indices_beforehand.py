"""Indices that were built before a run are those it would build, and it takes them."""

from pathlib import Path

from support.tiny_run import RUNS_OF_1, run_command


def test_indices_of_a_run_that_has_not_begun(tiny_config: Path, runs_of_1: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["tools/build_indices.py", tiny_config, f"run_dir={run}", *RUNS_OF_1["adamw"]]
    shown = run_command(*command)
    assert f"held-out samples in {run}/index_cache" in shown
    made, expected = (_contents(folder / "index_cache") for folder in (run, runs_of_1 / "adamw"))
    assert made == expected
    ages = _ages(run)
    run_command("pretrain/pretrain.py", *command[1:], "training.stop_after=1")
    assert _ages(run) == ages, "taken as they are"


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _ages(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (run / "index_cache").iterdir()}
