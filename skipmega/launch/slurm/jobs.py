"""A pre-training job for SLURM: checked, snapshot and submitted."""

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from skipmega.config import RunConfig, dump_config
from skipmega.data.files import atomic_write, find_pairs
from skipmega.errors import ConfigError, LaunchError
from skipmega.launch.estimate import GIB, Estimate, estimate
from skipmega.launch.run_folder import RunFolder
from skipmega.launch.slurm import client
from skipmega.launch.slurm.containers import check_container
from skipmega.launch.slurm.profile import Profile

Launcher = Literal["srun", "torchrun", "mpirun"]
_SNAPSHOT = ("skipmega", "pretrain", "tools", "slurm")


@dataclass(frozen=True)
class Job:
    """What is asked of the cluster; ``time`` as sbatch reads it.

    ``warning_seconds`` before the time limit SLURM's signal makes the run save and the job requeue itself. It
    gives up after ``max_failures`` failures, or ``max_stalled`` attempts in a row without a newer
    checkpoint. ``avoid_nodes``: nodes that the ``preflight`` names are excluded from the next attempt.
    ``node_indices``: every attempt begins with sample indices on each node's own disk. Of an array's runs
    ``at_once`` may run together.
    """

    name: str
    nodes: int
    gpus_per_node: int
    time: str
    launcher: Launcher = "srun"
    container: str | None = None
    after: int | None = None
    at_once: int | None = None
    exclude: str | None = None
    warning_seconds: int = 300
    max_failures: int = 20
    max_stalled: int = 3
    preflight: bool = True
    avoid_nodes: bool = False
    node_indices: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """One on every GPU (or on CPUs, as many)."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Submission:
    """A folder ``RUN/slurm/NNN``: script, configuration and code of one submission, its log and attempts."""

    path: Path

    def of_run(self, run: str) -> "Submission":
        """Of one run of an array whose submission this is."""
        return Submission(Path(run).absolute() / "slurm" / self.path.name)

    @property
    def config(self) -> Path:
        """The configuration that every attempt reads."""
        return self.path / "config.yaml"

    @property
    def code(self) -> Path:
        """The repository as it was."""
        return self.path / "code"

    @property
    def log(self) -> Path:
        """What all attempts print."""
        return self.path / "log"

    @property
    def runs(self) -> Path:
        """Names of the folders of an array's runs, by task."""
        return self.path / "runs.json"

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
        ConfigError: the grid does not fit the processes, the model not the memory, or a number or a container
            cannot be.
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
    if job.node_indices and config.data.index_cache is None:
        raise ConfigError(
            "--node-indices needs data.index_cache, a folder on a node's own disk: without it all nodes "
            "share the run's, and one process builds for all"
        )
    if job.container is not None:
        check_container(job.container, job.launcher, profile)
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


def next_submission(folder: Path, runs: Sequence[str] = ()) -> Submission:
    """Where the next submission of a run goes, or of an array whose runs have the folders ``runs``.

    Raises:
        LaunchError: a job of an earlier submission is still queued or running.
    """
    last = 0
    for run in (folder, *map(Path, runs)):
        for submission in submissions(run):
            number = submission.job.get("job")
            if number is not None and client.is_live(number):
                raise LaunchError(
                    f"job {number} of run_dir={run} is still in the queue: scancel {number} first, or "
                    "choose another run_dir"
                )
            last = max(last, int(submission.path.name))
    return Submission(folder / "slurm" / f"{last + 1:03d}")


def submit_job(config: RunConfig, job: Job, script: str, submission: Submission, root: Path) -> int:
    """Snapshot code and configuration into the run folder and queue the script; returns the job's number.

    Args:
        root: the repository, whose Python code, templates and configurations are copied.

    Raises:
        LaunchError: the run folder cannot be written, or SLURM refuses.
    """
    client.ask_whether_it_could_run(script)
    with writing(submission.path):
        snapshot(root, submission, script)
        write_config(submission, config)
    number = client.submit(script)
    record_job(submission, number, job, root)
    return number


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say what to do where a folder cannot be written before its job is queued."""
    try:
        yield
    except OSError as error:
        raise LaunchError(
            f"cannot write run_dir={folder.parents[1]} ({error.filename}: {error.strerror}), nothing was "
            "queued: make it writable, or choose another run_dir"
        ) from None


def snapshot(root: Path, submission: Submission, script: str) -> None:
    """Copy the repository's code into a new submission, and the script."""
    submission.path.mkdir(parents=True)
    (submission.path / "job.sbatch").write_text(script)
    for name in _SNAPSHOT:
        unwanted = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(root / name, submission.code / name, ignore=unwanted)


def write_config(submission: Submission, config: RunConfig) -> None:
    """What every attempt reads."""
    submission.path.mkdir(parents=True, exist_ok=True)
    submission.config.write_text(dump_config(config))


def record_job(submission: Submission, number: int | str, job: Job, root: Path) -> None:
    """Write down which job it is, or which task of an array (``17_3``), and what was asked for."""
    with atomic_write(submission.path / "job.json") as stream:
        stream.write(json.dumps({"job": number, **_commit(root), **asdict(job)}, indent=2).encode())


def _commit(root: Path) -> dict[str, str]:
    """The repository's commit, with a + if it has changes; unknown where there is no git."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return {"commit": "unknown"}
    return {"commit": said.stdout.strip() or "unknown"}
