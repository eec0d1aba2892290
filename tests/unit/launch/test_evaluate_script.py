"""What ``tools/evaluate.py`` refuses before it reads a model."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from skipmega import exit_codes

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "evaluate.py"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("export", ["--eval-density", "0.5"], "export again with tools/export_hf.py"),
        ("export", ["--eval-densities", "0.5,1"], "--eval-densities=0.5,1 moves the thresholds"),
        ("export", ["--follow"], "give a run"),
        ("run", ["--eval-densities", "half"], "--eval-densities=half: give numbers separated by commas"),
        ("run", ["--eval-densities", "0.5", "--follow"], "leave out --follow and --eval-density"),
        ("run", ["--eval-densities", "0.5", "--eval-density", "0.5"], "leave out --follow and"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    kind: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if kind == "export":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "skipmega"}))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path), "--tasks", "copa", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == exit_codes.USER_ERROR
    assert message in capsys.readouterr().err
