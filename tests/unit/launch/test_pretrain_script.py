"""``pretrain/pretrain.py`` as a user meets it: its output, its errors and its exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

from skipmega.config import load_config

ROOT = Path(__file__).resolve().parents[3]


def pretrain(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "pretrain/pretrain.py", *arguments],
        check=False, cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("training: {seed: 7, steps: 30}")
    path = tmp_path / "run.yaml"
    path.write_text("defaults: [base.yaml]\nmodel: {num_layers: 3}")
    return path


def test_the_printed_configuration_loads_back_equal(config_file: Path, tmp_path: Path) -> None:
    overrides = ["optimizer.learning_rate=1e-3", "training.steps=20"]
    done = pretrain(str(config_file), *overrides, "--print-config")
    assert (done.returncode, done.stderr) == (0, "")
    printed = tmp_path / "printed.yaml"
    printed.write_text(done.stdout)
    assert load_config(printed) == load_config(config_file, overrides)
    assert load_config(printed).training.seed == 7


def test_a_bad_field_is_one_error_message_and_exit_code_2(config_file: Path) -> None:
    done = pretrain(str(config_file), "model.num_layer=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("error:") == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "did you mean model.num_layers?" in done.stderr
