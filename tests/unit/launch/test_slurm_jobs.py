"""SLURM jobs as far as they go without SLURM: checked, refused and rendered."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from skipmega.config import RunConfig, load_config
from skipmega.errors import ConfigError, LaunchError
from skipmega.launch.slurm import client
from skipmega.launch.slurm.jobs import Job, Submission, check_job, parse_environment, submit_job
from skipmega.launch.slurm.profile import Profile, load_profile
from skipmega.launch.slurm.scripts import render_job
from skipmega.launch.slurm.status import read_events, read_status
from support.worlds import ROOT

TEMPLATES = ROOT / "slurm"


def job(**wanted: Any) -> Job:
    return Job(**{"name": "try it", "nodes": 2, "gpus_per_node": 4, "time": "1:00:00", **wanted})


def render(wanted: Job, profile: Profile, folder: Path) -> str:
    script = render_job(wanted, profile, Submission(folder / "it's a run" / "slurm" / "001"), TEMPLATES)
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr + script
    return script


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """One that could run, the data's files being there."""
    for name in ("tokenizer.model", "data.idx"):
        (tmp_path / name).touch()
    overrides = [
        f"run_dir={tmp_path}/run",
        f"data.tokenizer={tmp_path}/tokenizer.model",
        f"data.train=[{{path: {tmp_path}/data}}]",
        "model.vocab_size=512",
    ]
    return load_config(None, overrides)


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "mpirun"])
@pytest.mark.parametrize("containers", ["pyxis", "apptainer"])
def test_every_script_is_bash(tmp_path: Path, launcher: Any, containers: Any) -> None:
    profile = Profile(
        partition="gpu", account="us", gpu_option="gres", cpus_per_process=6, sbatch=["--exclusive"],
        setup=["module load cuda"], environment={"NCCL_SOCKET_IFNAME": "ib 0"}, python="/opt/a b/python",
        containers=containers, container_mounts=["/data:/data"],
    )  # fmt: skip
    wanted = job(launcher=launcher, container="image", after=17, exclude="n1", environment={"WHO": "it's me"})
    script = render(wanted, profile, tmp_path)
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    for line in (
        "--partition=gpu", "--account=us", "--gres=gpu:4", "--cpus-per-task=6", "--exclusive", "--exclude=n1",
        "--dependency=afterok:17", "--signal=B:USR1@300", "--open-mode=append", "--requeue", "--nodes=2",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in directives
    assert "export NCCL_SOCKET_IFNAME='ib 0'" in script
    assert """export WHO='it'"'"'s me'""" in script
    if containers == "apptainer":
        assert """apptainer exec --nv --bind /data:/data image "$PYTHON" """ in script
    elif launcher != "mpirun":
        assert "--container-image=image --container-mounts=/data:/data" in script
    if launcher == "mpirun":
        assert "mpirun --map-by ppr:4:node -np 8" in script
    else:
        tasks = "--ntasks=8 --ntasks-per-node=4 --cpus-per-task=6"
        if launcher == "torchrun":
            tasks = "--ntasks=2 --ntasks-per-node=1 --cpus-per-task=24"
        assert f"srun --nodes=2 {tasks}" in script


def test_what_the_site_does_not_say_is_not_asked_for(tmp_path: Path) -> None:
    script = render(job(preflight=False), Profile(gpu_option="none"), tmp_path)
    for word in ("partition", "account", "gres", "gpus-per-node", "cpus-per-task", "exclude", "doctor"):
        assert word not in script.split('. "$CODE/slurm/attempt.sh"')[0], word


@pytest.mark.parametrize(
    ("overrides", "wanted", "site", "message"),
    [
        ({}, {"nodes": 0}, {}, "--nodes 0 and --gpus-per-node 4 must be at least 1"),
        ({"parallel.tensor_parallel": 16}, {}, {}, "8 processes cannot hold"),
        ({"training.global_batch_size": 33}, {}, {}, "use a multiple of 32"),
        (
            {},
            {},
            {"gpu_memory_gib": 0.5},
            r"needs about [\d.]+ GiB, and the site's GPUs have gpu_memory_gib=0.5",
        ),
        ({}, {"container": "gone.sif"}, {"containers": "apptainer"}, "gone.sif cannot be seen from here"),
        (
            {},
            {"container": "image", "launcher": "mpirun"},
            {},
            "--launcher mpirun would leave the container out: choose srun or torchrun, or",
        ),
        (
            {},
            {"node_indices": True},
            {},
            "--node-indices needs data.index_cache, a folder on a node's own disk",
        ),
        ({"data.tokenizer": "gone"}, {}, {}, "data.tokenizer=gone is no file that is visible here"),
        ({"data.train": "[{path: gone}]"}, {}, {}, "data set gone.idx is not there"),
    ],
)
def test_what_cannot_run_is_refused(
    config: RunConfig, tmp_path: Path, overrides: dict[str, Any], wanted: Any, site: Any, message: str
) -> None:
    assert check_job(config, job(), Profile()).processes == 8
    (tmp_path / "all.yaml").write_text("")
    base = [
        f"run_dir={config.run_dir}",
        f"data.tokenizer={config.data.tokenizer}",
        f"data.train=[{{path: {config.data.train[0].path}}}]",
        "model.vocab_size=512",
    ]
    broken = load_config(None, [*base, *(f"{name}={value}" for name, value in overrides.items())])
    with pytest.raises(ConfigError, match=message):
        check_job(broken, job(**wanted), Profile(**site))


def test_without_sbatch_nothing_is_written(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"sbatch is not on PATH: .* login node .* --dry-run"):
        submit_job(config, job(), "#!/bin/bash\n", Submission(Path(config.run_dir) / "slurm" / "001"), ROOT)
    assert not Path(config.run_dir).exists()


def test_fields_of_scontrol_may_hold_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = (
        "JobId=7 JobName=a job JobState=PENDING Reason=None TRES=cpu=4,node=2 Command=(null) Restarts=0 \n"
    )
    done = subprocess.CompletedProcess([], 0, stdout=shown, stderr="")
    monkeypatch.setattr(client, "_run", lambda *_: done)
    fields = client.show_job(7)
    assert (fields["JobName"], fields["JobState"], fields["Restarts"]) == ("a job", "PENDING", "0")
    assert fields["TRES"] == "cpu=4,node=2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "partitoin: Extra inputs are not permitted; known fields: partition, account"),
        ("gpu_option: some", "gpu_option: Input should be 'gpus-per-node', 'gres' or 'none'"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_profile(path)


def test_the_example_profile_is_one() -> None:
    assert load_profile(TEMPLATES / "profiles" / "example.yaml").partition == "gpu"
    with pytest.raises(ConfigError, match=r"cannot read site profile nowhere.yaml"):
        load_profile("nowhere.yaml")


def test_variables_are_name_and_value() -> None:
    assert parse_environment(["A=1", "B=a=b"]) == {"A": "1", "B": "a=b"}
    with pytest.raises(ConfigError, match="--env 'A' is not of the form NAME=VALUE"):
        parse_environment(["A"])


def test_a_run_that_was_never_submitted_has_no_state(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="was never submitted"):
        read_status(tmp_path)


def test_a_line_cut_short_is_no_event(tmp_path: Path) -> None:
    (tmp_path / "attempts.tsv").write_text("now\t0\tstart\tnone\tn[1-2]\nnow\t0\tfai")
    assert [event.kind for event in read_events(Submission(tmp_path))] == ["start"]
