"""Submitting training as a user does: the scripts of the repository, called as commands."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from skipmega.launch.cli import run_script
from support.tiny_run import records
from support.worlds import ROOT

STEPS = 6
START = 150  # seconds that a job of four processes may take on two busy cores


def script(path: Path, *arguments: str, code: int = 0, **variables: str) -> str:
    """Run a script of the repository; returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(path), *arguments], cwd=ROOT, env={**os.environ, **variables},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=START + 60, check=False,
    )  # fmt: skip
    assert done.returncode == code, f"exit {done.returncode}:\n{done.stdout}"
    return done.stdout


def refused_by_submit(*arguments: str) -> str:
    """What submit.py says to arguments that it refuses; in this process, since its start takes seconds."""
    main = runpy.run_path(str(ROOT / "slurm" / "submit.py"))["main"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(printed):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["submit.py", *arguments])
        with pytest.raises(SystemExit, match="2"):
            run_script(main)
    return printed.getvalue()


def submit(*arguments: str, code: int = 0, **variables: str) -> str:
    return script(ROOT / "slurm" / "submit.py", *arguments, code=code, **variables)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run, "train").values()]


def shape(site: Path, launcher: str = "srun", nodes: int = 2) -> list[str]:
    where = ["--nodes", str(nodes), "--gpus-per-node", "2", "--time", "10", "--profile", str(site)]
    return [*where, "--launcher", launcher, "--no-preflight"]
