"""Work on a corpus on a cluster: a chain of jobs, arrays most of them, each when all before it is done."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from skipmega.errors import LaunchError
from skipmega.launch.slurm import client
from skipmega.launch.slurm.profile import Profile
from skipmega.launch.slurm.scripts import render

RETRIES = 3
_TASK = '"$SLURM_ARRAY_TASK_ID"'


@dataclass(frozen=True)
class Step:
    """One job of a chain: ``tool`` with ``arguments``; with ``tasks`` an array of them, each of which is told
    its number by ``task``, shell text. ``log`` ends the name of its log."""

    tool: str
    arguments: Sequence[str]
    log: str
    tasks: int = 0
    task: str = ""


@dataclass(frozen=True)
class DataJob:
    """A chain, and what it asks of the cluster: logs are ``<output>.<log>``, ``workers`` the processes of a
    task, ``time`` the limit of one job."""

    output: Path
    steps: Sequence[Step]
    workers: int
    time: str

    @property
    def name(self) -> str:
        """What SLURM calls its jobs."""
        return self.output.name

    @property
    def nodes(self) -> int:
        """Of one task."""
        return 1


def preparation(output: Path, options: Sequence[str], shards: int, workers: int) -> list[Step]:
    """Tokenizing by shards, and a job that joins them.

    Args:
        output: the pair's path without an ending.
        options: of tools/prepare_data.py but ``--output`` and ``--workers``, its inputs included.
    """
    arguments = [*options, "--output", str(output)]
    tool = "tools/prepare_data.py"
    shard = f"--shard {_TASK}/{shards}"
    return [
        Step(tool, [*arguments, "--workers", str(workers)], "log-%a", shards, shard),
        Step(tool, [*arguments, "--merge", str(shards)], "log-merge"),
    ]


def shuffling(arguments: Sequence[str], shards: int) -> list[Step]:
    """Documents of some pairs to shards of a shuffled source.

    Args:
        arguments: of tools/data.py shuffle.
    """
    return [Step("tools/data.py", ["shuffle", *arguments], "log-%a", shards, f"--shard {_TASK}")]


def cleaning(arguments: Sequence[str], stages: Sequence[tuple[str, int]]) -> list[Step]:
    """All stages of a cleaning, and a job that sums them up.

    Args:
        arguments: configuration and overrides.
        stages: their names, and how many tasks each has.
    """
    tool = "tools/clean_data.py"
    steps = [
        Step(tool, [*arguments, "--stage", stage], f"log-{stage}-%a", tasks, f"--task {_TASK}")
        for stage, tasks in stages
    ]
    return [*steps, Step(tool, [*arguments, "--report"], "log-report")]


def render_data_jobs(job: DataJob, profile: Profile, root: Path) -> list[str]:
    """The batch scripts of all steps."""
    return [_render(job, step, profile, root) for step in job.steps]


def submit_data_jobs(job: DataJob, profile: Profile, root: Path) -> list[int]:
    """Queue all steps; returns their numbers.

    Raises:
        LaunchError: the output's folder cannot be written, or SLURM refuses.
    """
    scripts = render_data_jobs(job, profile, root)
    client.ask_whether_it_could_run(scripts[0])
    try:
        job.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"cannot write --output {job.output} ({error.filename}: {error.strerror}), nothing was queued: "
            "make it writable, or choose another"
        ) from None
    numbers: list[int] = []
    for script in scripts:
        after = (f"--dependency=afterok:{numbers[-1]}", "--kill-on-invalid-dep=yes") if numbers else ()
        numbers.append(client.submit(script, *after))
    return numbers


def _render(job: DataJob, step: Step, profile: Profile, root: Path) -> str:
    options = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "mem": profile.memory_per_node,
    }
    return render(
        "data_job.sbatch.j2",
        root / "slurm",
        job=job,
        step=step,
        profile=profile,
        retries=RETRIES,
        code=str(root),
        arguments=shlex.join(step.arguments),
        log=f"{job.output}.{step.log}",
        here=os.getcwd(),
        sbatch_options=[(name, value) for name, value in options.items() if value],
        environment=profile.environment,
    )
