"""Real training, disturbed in every way a cluster knows, ends with the weights of a run nobody disturbed."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from slurm_cluster import Cluster
from submitting import script, shape, submit

from skipmega.checkpoint.store import Checkpoint
from skipmega.launch.slurm.status import RunStatus, follow, read_status
from support.tiny_run import records
from support.worlds import ROOT

STEPS = 60
KILLED = ["another node", "batch host", "slurmd of the batch host"]
DISTURBANCES = ["warning", "time limit", "requeue", "preemption", *KILLED]


@pytest.fixture(scope="session")
def longer(quickstart: list[str]) -> list[str]:
    return [*quickstart, f"training.steps={STEPS}", "checkpoint.interval=5", "parallel.tensor_parallel=2"]


@pytest.fixture(scope="session")
def undisturbed(longer: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four processes on this machine."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    launcher = Path(torch.__file__).parent / "distributed" / "run.py"
    train = str(ROOT / "pretrain" / "pretrain.py")
    script(launcher, "--standalone", "--nproc-per-node=4", train, *longer, f"run_dir={run}")
    return run


def follow_recovery(run: Path) -> tuple[RunStatus, float, float]:
    """Until the end; also the seconds from now to the start of the next attempt, and to its first record."""
    began = time.monotonic()
    attempt = read_status(run).attempts
    metrics, seen = run / "metrics.jsonl", {}

    def look(line: str) -> None:
        now = time.monotonic() - began
        if f"attempt {attempt + 1}" in line:
            seen.setdefault("started", now)
        records = metrics.read_text().splitlines()
        starts = [n for n, record in enumerate(records) if '"kind": "start"' in record]
        if len(starts) > attempt and len(records) > starts[attempt] + 1:
            seen.setdefault("trained", now)

    return follow(run, show=look, every=0.5), seen["started"], seen["trained"]


def bring_time_limit_near(cluster: Cluster, job: str, run: Path) -> None:
    """An attempt may now take a minute until SLURM warns of its end; this one is held up until it does."""
    held = next(
        pid
        for pid, (_, *arguments) in running()
        if "/pretrain.py" in str(arguments[:1]) and str(run) in str(arguments[1:])
    )
    os.kill(held, signal.SIGSTOP)
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=6")
    end = time.monotonic() + 150
    while not (run / "stop").exists() and time.monotonic() < end:
        time.sleep(0.2)
    os.kill(held, signal.SIGCONT)


def running() -> Iterator[tuple[int, list[str]]]:
    """Process ids and command lines."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it may have ended
            yield int(path.parent.name), path.read_text(errors="replace").split("\0")


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("what", DISTURBANCES)
def test_it_ends_with_the_same_weights(
    cluster: Cluster,
    longer: list[str],
    undisturbed: Path,
    site: Path,
    tmp_path: Path,
    what: str,
) -> None:
    run = tmp_path / "run"
    submit(*longer, f"run_dir={run}", *shape(site))
    job = str(read_status(run).job)
    end = time.monotonic() + 400
    while not any((run / "checkpoints").glob("step-000000[1-9]?")):
        log = read_status(run).submission.log
        assert time.monotonic() < end, log.read_text() if log.exists() else job
        time.sleep(0.2)
    hosts = cluster.command("scontrol", "show", "hostnames", cluster.wait(int(job), bool)["NodeList"]).split()
    if what == "warning":
        cluster.command("scancel", "--batch", "--signal=USR1", job)
    elif what == "time limit":
        bring_time_limit_near(cluster, job, run)
    elif what == "requeue":
        cluster.command("scontrol", "requeue", job)
    elif what == "preemption":
        cluster.command("srun", "--partition=high", "--nodes=3", "--ntasks=3", "--exclusive", "true")
    elif what == "slurmd of the batch host":
        cluster.do("kill-slurmd", hosts[0])
    else:
        cluster.do("kill-node", hosts[0 if what == "batch host" else 1])
    ended, started, trained = follow_recovery(run)
    print(f"{what}: next attempt after {started:.0f} s, its first step after {trained:.0f} s")
    log = ended.submission.log.read_text()
    assert ended.is_done, log
    assert ended.attempts == 2 or (what == "time limit" and ended.attempts > 2), log
    assert f"attempt 2, from {run}/checkpoints/step-" in log
    assert records(run, "train")[STEPS]["loss"] == records(undisturbed, "train")[STEPS]["loss"]
    name = f"checkpoints/step-{STEPS:08d}"
    weights, expected = (Checkpoint.open(folder / name).read_weights() for folder in (run, undisturbed))
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(weights[key], value), key
