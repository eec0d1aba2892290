"""A pre-training job for SLURM: checked, written, snapshot and submitted, in that order."""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from skipmega.config import RunConfig, dump_config
from skipmega.data.files import atomic_write, find_pairs
from skipmega.errors import ConfigError, LaunchError
from skipmega.launch.estimate import GIB, Estimate, estimate
from skipmega.launch.run_folder import RunFolder
from skipmega.launch.slurm import client
from skipmega.launch.slurm.profile import Profile

Launcher = Literal["srun", "torchrun", "mpirun"]
_SNAPSHOT = ("skipmega", "pretrain", "tools", "slurm")


@dataclass(frozen=True)
class Job:
    """What is asked of the cluster; ``time`` as sbatch reads it.

    ``warning_seconds`` before the time limit SLURM's signal makes the run save and the job requeue itself. It
    gives up after ``max_failures`` failures, or ``max_stalled`` attempts in a row without a newer
    checkpoint. ``avoid_nodes``: nodes that the ``preflight`` names are excluded from the next attempt.
    """

    name: str
    nodes: int
    gpus_per_node: int
    time: str
    launcher: Launcher = "srun"
    container: str | None = None
    after: int | None = None
    exclude: str | None = None
    warning_seconds: int = 300
    max_failures: int = 20
    max_stalled: int = 3
    preflight: bool = True
    avoid_nodes: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """One on every GPU (or on CPUs, as many)."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Submission:
    """A folder ``RUN/slurm/NNN``: script, configuration and code of one submission, its log and attempts."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration that every attempt reads."""
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        """What all attempts print."""
        return self.path / "log"

    @property
    def job(self) -> dict[str, Any]:
        """The job's number and what was asked for; empty if it was never queued."""
        file = self.path / "job.json"
        return json.loads(file.read_text()) if file.is_file() else {}


def submissions(run: Path) -> list[Submission]:
    """All submissions of a run, the oldest first."""
    return [Submission(path) for path in sorted((run / "slurm").glob("[0-9][0-9][0-9]"))]


def check_job(config: RunConfig, job: Job, profile: Profile) -> Estimate:
    """Refuse what cannot run on these nodes, before anything is written or queued; returns the estimate.

    Raises:
        ConfigError: the grid does not fit the processes, the model not the memory, or a number cannot be.
        CheckpointError: the run folder holds something else.
    """
    if job.nodes < 1 or job.gpus_per_node < 1:
        raise ConfigError(f"--nodes {job.nodes} and --gpus-per-node {job.gpus_per_node} must be at least 1")
    cost = estimate(config, job.processes, profile.mfu, profile.peak_tflops)
    if config.data.tokenizer is None or not Path(config.data.tokenizer).is_file():
        raise ConfigError(f"data.tokenizer={config.data.tokenizer} is no file that is visible here")
    sources = (*config.data.train, *config.data.valid)
    for prefix in (prefix for source in sources for prefix in find_pairs(source.path)):
        if not Path(f"{prefix}.idx").is_file():
            raise ConfigError(f"data set {prefix}.idx is not there: prepare it first, or mend data.train")
    available = profile.gpu_memory_gib
    if available is not None and cost.memory.total / GIB > available:
        raise ConfigError(
            f"a process of stage {cost.memory.stage} needs about {cost.memory.total / GIB:.1f} GiB, and the "
            f"site's GPUs have gpu_memory_gib={available:g}: more tensor or pipeline parallelism, a higher "
            "parallel.zero_stage, training.recompute or a smaller training.micro_batch_size"
        )
    RunFolder(config).check()
    return cost


def parse_environment(items: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` strings to variables.

    Raises:
        ConfigError: one is not of that form.
    """
    for item in items:
        if "=" not in item or not item.partition("=")[0].isidentifier():
            raise ConfigError(f"--env {item!r} is not of the form NAME=VALUE")
    return dict(item.split("=", 1) for item in items)


def render_job(config: RunConfig, job: Job, profile: Profile, submission: Submission, templates: Path) -> str:
    """The batch script's text."""
    options = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "mem": profile.memory_per_node,
        "cpus-per-task": profile.cpus_per_process,
        "exclude": job.exclude,
        "dependency": job.after and f"afterok:{job.after}",
        "kill-on-invalid-dep": job.after and "yes",
    }
    return render(
        "pretrain.sbatch.j2",
        templates,
        job=job,
        profile=profile,
        processes_per_node=job.gpus_per_node,
        run_dir=str(Path(config.run_dir).absolute()),
        submission=str(submission.path),
        log=str(submission.log),
        here=os.getcwd(),
        sbatch_options=[(name, value) for name, value in options.items() if value],
        environment={**profile.environment, **job.environment},
        srun_processes=_srun(job, profile, job.gpus_per_node),
        srun_nodes=_srun(job, profile, 1),
        container=_apptainer(job, profile),
    )


def render(template: str, templates: Path, **values: Any) -> str:
    """Fill in a template of the folder ``templates``; a name that it misses is an error."""
    environment = Environment(
        loader=FileSystemLoader(templates),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = shlex.quote
    return environment.get_template(template).render(**values)


def next_submission(config: RunConfig) -> Submission:
    """Where the next submission of a run goes; nothing is written.

    Raises:
        LaunchError: a job of an earlier submission is still queued or running.
    """
    run = Path(config.run_dir).absolute()
    earlier = submissions(run)
    for submission in earlier:
        number = submission.job.get("job")
        if number is not None and client.is_live(number):
            raise LaunchError(
                f"job {number} of run_dir={config.run_dir} is still in the queue: scancel {number} first, or "
                "choose another run_dir"
            )
    last = int(earlier[-1].path.name) if earlier else 0
    return Submission(run / "slurm" / f"{last + 1:03d}")


def submit_job(config: RunConfig, job: Job, script: str, submission: Submission, root: Path) -> int:
    """Snapshot code and configuration into the run folder and queue the script; returns the job's number.

    Args:
        root: the repository, whose Python code, templates and configurations are copied.

    Raises:
        LaunchError: the run folder cannot be written, or SLURM refuses.
    """
    client.ask_whether_it_could_run(script)
    try:
        submission.path.mkdir(parents=True)
        submission.config.write_text(dump_config(config))
        (submission.path / "job.sbatch").write_text(script)
        _snapshot(root, submission.path / "code")
    except OSError as error:
        raise LaunchError(
            f"cannot write run_dir={config.run_dir} ({error.filename}: {error.strerror}), nothing was "
            "queued: make it writable, or choose another run_dir"
        ) from None
    number = client.submit(script)
    with atomic_write(submission.path / "job.json") as stream:
        stream.write(json.dumps({"job": number, **_commit(root), **asdict(job)}, indent=2).encode())
    return number


def _snapshot(root: Path, target: Path) -> None:
    for name in _SNAPSHOT:
        shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def _commit(root: Path) -> dict[str, str]:
    """The repository's commit, with a + if it has changes; unknown where there is no git."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return {"commit": "unknown"}
    return {"commit": said.stdout.strip() or "unknown"}


def _srun(job: Job, profile: Profile, tasks_per_node: int) -> str:
    """The start of a command that runs that many tasks on every node, with all of the node's CPUs."""
    options = [
        f"--nodes={job.nodes}",
        f"--ntasks={job.nodes * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
    ]
    if profile.cpus_per_process is not None:  # since SLURM 22.05 srun does not take it from the job
        options.append(f"--cpus-per-task={profile.cpus_per_process * job.gpus_per_node // tasks_per_node}")
    return shlex.join(["srun", *options, *profile.srun_options, *_pyxis(job, profile)])


def _pyxis(job: Job, profile: Profile) -> list[str]:
    if job.container is None or profile.containers != "pyxis":
        return []
    mounts = ",".join(profile.container_mounts)
    return [f"--container-image={job.container}", *([f"--container-mounts={mounts}"] if mounts else [])]


def _apptainer(job: Job, profile: Profile) -> str:
    if job.container is None or profile.containers != "apptainer":
        return "\\\n"
    binds = [part for mount in profile.container_mounts for part in ("--bind", mount)]
    return shlex.join(["apptainer", "exec", "--nv", *binds, job.container]) + " \\\n"
