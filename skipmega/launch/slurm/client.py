"""The few questions and orders that go to SLURM's own commands. None of them needs accounting."""

import re
import shutil
import subprocess

from skipmega.errors import LaunchError

# all others are of jobs that wait, run, are being signalled or completed, or come back
_ENDED_STATES = frozenset(
    (
        *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE"),
        *("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED"),
    )
)


def submit(script: str, *options: str) -> int:
    """Queue a batch script's text, with options of sbatch beside its own; returns the job's number.

    Raises:
        LaunchError: sbatch is missing, or refuses.
    """
    return int(_sbatch(script, "--parsable", *options).stdout.split(";")[0])


def ask_whether_it_could_run(script: str) -> str:
    """``sbatch --test-only``: queues nothing; returns SLURM's guess when and where the job would start.

    Raises:
        LaunchError: sbatch is missing, or says that the job can never run.
    """
    return _sbatch(script, "--test-only").stderr.replace("sbatch: ", "").strip()


def show_job(job: int | str) -> dict[str, str]:
    """What scontrol knows of a job, by field; empty once SLURM has forgotten it, minutes after its end.

    Raises:
        LaunchError: scontrol is missing or the controller does not answer.
    """
    shown = _run(["scontrol", "show", "job", "--oneliner", str(job)])
    if shown.returncode:
        if "Invalid job id" in shown.stderr:
            return {}
        raise LaunchError(f"scontrol show job {job} failed: {shown.stderr.strip()}")
    record = shown.stdout.splitlines()[-1].rstrip()
    return dict(re.findall(r"(?:^| )([A-Za-z:/]+)=(.*?)(?= [A-Za-z:/]+=|$)", record))


def is_live(job: int | str) -> bool:
    """Whether a job is in the queue or runs."""
    return not has_ended(show_job(job).get("JobState"))


def srun_takes(option: str) -> bool:
    """Whether srun knows an option, a plugin's included."""
    return option in _run(["srun", "--help"]).stdout


def has_ended(state: str | None) -> bool:
    """Whether a job in this state is over; so is one that SLURM has forgotten (None)."""
    return state is None or state in _ENDED_STATES


def _sbatch(script: str, *options: str) -> "subprocess.CompletedProcess[str]":
    done = _run(["sbatch", *options], script)
    if done.returncode:
        said = done.stderr.replace("sbatch: error: ", "").replace("sbatch: ", "").strip()
        raise LaunchError(f"SLURM refuses the job, nothing was queued: {said}\n{_mend(said)}")
    return done


def _mend(said: str) -> str:
    lowered = said.lower()
    if "partition" in lowered:
        partitions = _run(["sinfo", "--noheader", "--format=%R"]).stdout.split()
        return f"partitions here: {', '.join(partitions)}; give --partition, or partition in the site profile"
    if "account" in lowered:
        return "give --account, or account in the site profile"
    if "time limit" in lowered:
        limits = _run(["sinfo", "--noheader", "--format=%R (%l)"]).stdout.splitlines()
        return (
            f"limits of the partitions: {', '.join(limits)}; give a shorter --time, the job continues itself"
        )
    nodes = _run(["sinfo", "--noheader", "--format=%R: %D nodes of %c CPUs, %G"]).stdout.splitlines()
    return f"there are {'; '.join(nodes)}: ask for fewer --nodes or --gpus-per-node"


def _run(command: list[str], given: str | None = None) -> "subprocess.CompletedProcess[str]":
    if shutil.which(command[0]) is None:
        raise LaunchError(
            f"{command[0]} is not on PATH: run this on a login node of the cluster (or load its SLURM "
            "module), or see the script with --dry-run"
        )
    return subprocess.run(command, input=given, capture_output=True, text=True, check=False)
