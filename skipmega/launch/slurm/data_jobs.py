"""Preparing a corpus on a cluster: an array of shards, and a job that joins them when all are there."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from skipmega.data.shards import shards_folder
from skipmega.errors import LaunchError
from skipmega.launch.slurm import client
from skipmega.launch.slurm.profile import Profile
from skipmega.launch.slurm.scripts import render

RETRIES = 3


@dataclass(frozen=True)
class DataJob:
    """What is prepared, and what of the cluster for: ``options`` are those of tools/prepare_data.py but
    ``--output`` and ``--workers``, its inputs included; ``workers`` are the processes of a shard."""

    name: str
    output: Path
    options: Sequence[str]
    shards: int
    workers: int
    time: str

    @property
    def nodes(self) -> int:
        """Of one shard."""
        return 1


def render_data_jobs(job: DataJob, profile: Profile, root: Path) -> tuple[str, str]:
    """The batch scripts of the array and of the job that joins."""
    output = ["--output", str(job.output.absolute())]
    arguments = [*job.options, *output, "--workers", str(job.workers)]
    array = _render(job, profile, root, arguments, "log-%a", shards=job.shards)
    merge = [*job.options, *output, "--merge", str(job.shards)]
    return array, _render(job, profile, root, merge, "log-merge", shards=0)


def submit_data_jobs(job: DataJob, profile: Profile, root: Path) -> tuple[int, int]:
    """Queue both; returns their numbers.

    Raises:
        LaunchError: the output's folder cannot be written, or SLURM refuses.
    """
    array, merge = render_data_jobs(job, profile, root)
    client.ask_whether_it_could_run(array)
    try:
        shards_folder(job.output.absolute()).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"cannot write --output {job.output} ({error.filename}: {error.strerror}), nothing was queued: "
            "make it writable, or choose another"
        ) from None
    number = client.submit(array)
    return number, client.submit(merge, f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes")


def _render(
    job: DataJob, profile: Profile, root: Path, arguments: Sequence[str], log: str, shards: int
) -> str:
    options = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "mem": profile.memory_per_node,
    }
    return render(
        "prepare_data.sbatch.j2",
        root / "slurm",
        job=job,
        profile=profile,
        workers=job.workers,
        shards=shards,
        retries=RETRIES,
        code=str(root),
        arguments=shlex.join(arguments),
        # beside the shards' folder, which the joining job removes
        log=str(job.output.absolute().parent / f"{job.output.name}.{log}"),
        here=os.getcwd(),
        sbatch_options=[(name, value) for name, value in options.items() if value],
        environment=profile.environment,
    )
