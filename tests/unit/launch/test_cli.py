"""Scripts end with one sentence for what a user can mend, and with a traceback for what is ours."""

from pathlib import Path

import pytest

from skipmega.errors import (
    CheckpointError,
    DataError,
    RunFaultError,
    RunFencedError,
    RunStopped,
    SkipmegaError,
)
from skipmega.launch.cli import run_script


def fail_with(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DataError("corpus.jsonl is empty"), "error: corpus.jsonl is empty\n"),
        (OSError(28, "No space left", "metrics.jsonl"), "error: No space left: metrics.jsonl\n"),
        (OSError("closed"), "error: closed\n"),
    ],
)
def test_what_can_be_mended_is_one_sentence(
    error: Exception, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: fail_with(error))
    assert ended.value.code == 2
    assert capfd.readouterr().err == message


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (CheckpointError("no space"), 2, "error: no space\n"),
        (RunStopped("SIGTERM at step 3"), 75, "stopped: SIGTERM at step 3\n"),
        (RunFencedError("attempt 2 runs"), 76, "error: attempt 2 runs\n"),
        (RunFaultError("loss nan"), 78, "error: loss nan\n"),
    ],
)
def test_the_status_says_whether_to_start_again(
    error: SkipmegaError, code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: fail_with(error))
    assert ended.value.code == code
    assert capfd.readouterr().err == message


def test_a_batch_script_finds_the_status_that_a_launcher_hides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIPMEGA_EXIT_DIR", str(tmp_path))
    for main in (
        lambda: fail_with(RunStopped("SIGTERM")),
        lambda: fail_with(DataError("gone")),
        lambda: None,
    ):
        with pytest.raises(SystemExit):
            run_script(main)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "75"]
    monkeypatch.setenv("SKIPMEGA_EXIT_DIR", str(tmp_path / "missing"))
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: fail_with(RunStopped("SIGTERM")))
    assert ended.value.code == 75


@pytest.mark.parametrize("error", [ZeroDivisionError(), BrokenPipeError(), TimeoutError()])
def test_a_bug_keeps_its_traceback_and_so_does_a_lost_process(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_script(lambda: fail_with(error))


def test_success_is_zero() -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: None)
    assert ended.value.code == 0
