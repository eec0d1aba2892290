"""Arrays of runs as far as they go without SLURM: their overrides, folders and refusals."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipmega.errors import ConfigError
from skipmega.launch.slurm.arrays import folder_of, load_runs, read_array
from skipmega.launch.slurm.jobs import Job, Submission
from skipmega.launch.slurm.profile import Profile
from skipmega.launch.slurm.scripts import render_job
from support.worlds import ROOT


def test_runs_by_values_and_by_lines(tmp_path: Path) -> None:
    assert read_array("training.seed=1,2") == [["training.seed=1"], ["training.seed=2"]]
    lines = tmp_path / "runs"
    lines.write_text(
        "# rates\ntraining.seed=1 optimizer.learning_rate=1e-3\n\n'data.train=[{path: a b}]'  # two\n"
    )
    assert read_array(str(lines)) == [
        ["training.seed=1", "optimizer.learning_rate=1e-3"],
        ["data.train=[{path: a b}]"],
    ]
    first, second = load_runs(None, [f"run_dir={tmp_path}/sweep"], read_array(str(lines)))
    assert (first.training.seed, first.optimizer.learning_rate) == (1, 1e-3)
    assert first.run_dir == f"{tmp_path}/sweep/training.seed=1,optimizer.learning_rate=1e-3"
    assert second.data.train[0].path == "a b"
    assert second.run_dir == f"{tmp_path}/sweep/data.train=--path--a-b--"


@pytest.mark.parametrize(
    ("given_array", "message"),
    [
        ("gone.txt", "--array gone.txt is no file, and not of the form FIELD=VALUE,VALUE"),
        ("training.seed=1,1", "two runs would share the folder training.seed=1;"),
        ("data.tokenizer=a/b,a:b", "two runs would share the folder data.tokenizer=a-b;"),
    ],
)
def test_what_is_no_array_is_refused(given_array: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_array(given_array)
    assert message in str(refused.value)


def test_an_empty_file_is_no_array(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("# none yet\n\n")
    with pytest.raises(ConfigError, match="names no run: put the overrides of each in a line"):
        read_array(str(tmp_path / "runs"))


def test_a_run_that_cannot_be_is_named(tmp_path: Path) -> None:
    base = [f"run_dir={tmp_path}"]
    with pytest.raises(ConfigError, match=r"(?s)run 1 of --array \(training.sed=2\): .*training.sed: no"):
        load_runs(None, base, [["training.seed=1"], ["training.sed=2"]])
    with pytest.raises(ConfigError, match=r"run 0 of --array \(run_dir=x\): its folder is named after"):
        load_runs(None, base, [["run_dir=x"]])
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="holds a single run: give the array a folder of its own"):
        load_runs(None, base, [["training.seed=1"]])


@given(st.lists(st.text(min_size=1), min_size=1), st.integers(1, 200))
def test_folders_are_single_names_that_any_file_system_takes(values: list[str], times: int) -> None:
    overrides = [f"a={value}" for value in values * times]
    name = folder_of(overrides)
    assert name.isascii()
    assert name.isprintable()
    assert "/" not in name
    assert len(name) < 255
    if len(name) > 120:
        assert name != folder_of([*overrides, "b=1"]), "long ones differ too"


def test_the_script_finds_its_run_by_task(tmp_path: Path) -> None:
    job = Job(name="sweep", nodes=1, gpus_per_node=1, time="10", at_once=2)
    submission = Submission(tmp_path / "slurm" / "003")
    script = render_job(
        job, Profile(), submission, ROOT / "slurm", [f"{tmp_path}/a b", f"{tmp_path}/c", "/d"]
    )
    assert "#SBATCH --array=0-2%2\n" in script
    assert f"#SBATCH --output={tmp_path}/slurm/003/log-%a\n" in script
    assert f"RUNS=('{tmp_path}/a b' {tmp_path}/c /d)\n" in script
    assert "SUBMISSION=$RUN/slurm/003\n" in script
    assert f"CODE={tmp_path}/slurm/003/code\n" in script
