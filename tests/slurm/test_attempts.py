"""The batch script on a real SLURM: what ends a job, what brings it back, and what stops it for good.

A stand-in trains (:mod:`stand_in`), so that the cluster is what takes the time.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from stand_in_runs import StandInRun, submit_stand_in

from skipmega.launch.slurm.status import ask_to_stop, read_status

Start = Callable[..., StandInRun]


def test_what_ends_a_job_and_what_brings_it_back(cluster: Cluster, start: Start) -> None:
    """Every exit of a process, on as many jobs at once. A step without a checkpoint is no progress."""
    one = {"nodes": 1}
    done = start("done", **one)
    refused = start("refused", {"exits": {"0": (7, 2)}}, **one)
    fault = start("fault", {"exits": {"0": (7, 78)}}, **one)
    fenced = start("fenced", {"exits": {"0": (7, 76)}}, **one)
    failed = start("failed", {"exits": {"0": (7, 1)}}, **one)
    hung = start("hung", {"exits": {"0": (7, 77)}}, **one)
    stalled = start("stalled", {"exits": {str(n): (7, 1) for n in range(9)}}, **one)
    failing = {"exits": {"0": (7, 1), "1": (12, 1), "2": (17, 1), "3": (22, 1)}}
    failures = start("failures", failing, max_failures=2, **one)

    for run, state, code, events in (
        (done, "COMPLETED", 0, ["start", "done"]),
        (refused, "FAILED", 2, ["start", "refused"]),
        (fault, "FAILED", 78, ["start", "fault"]),
        (failed, "COMPLETED", 0, ["start", "failed", "start", "done"]),
        (hung, "COMPLETED", 0, ["start", "failed", "start", "done"]),
        # the first attempt saved step 5 and progressed from nothing to it; the next ones begin there
        (stalled, "FAILED", 1, [*["start", "failed"] * 4, "gave-up"]),
        (failures, "FAILED", 1, [*["start", "failed"] * 2, "start", "gave-up"]),
    ):
        ended = cluster.wait_for_end(run.job, 120)
        assert ended["JobState"] == state, f"{run.folder.name}: {ended}\n{run.log}"
        assert (run.folder.name, run.events) == (run.folder.name, events), run.log
        assert run.exit_status == code
    assert cluster.wait_for_end(fenced.job)["ExitCode"] == "76:0", fenced.log
    assert fenced.events == ["start"], "a run that another attempt owns is left alone"
    for run in (done, failed, hung):
        run.assert_complete()
    assert "3 attempts in a row made no progress" in stalled.log
    status = read_status(done.folder)
    assert (status.state, status.attempts, status.is_live) == ("done", 1, False)
    assert read_status(stalled.folder).state == "gave-up"


def test_a_warning_saves_and_requeues(cluster: Cluster, start: Start, repository: Path) -> None:
    """SLURM's signal to the batch shell, a requeue by hand, a person's wish to stop, a new submission."""
    warned, stopped, requeued = runs = [
        start(name, {"steps": 80}, nodes=1) for name in ("warned", "stopped", "requeued")
    ]
    for run in runs:
        run.wait_for_steps(5)
    ask_to_stop(stopped.folder)
    cluster.command("scontrol", "requeue", str(requeued.job))
    cluster.command("scancel", "--batch", "--signal=USR1", str(warned.job))
    warned.wait_for_second_attempt("a warning")
    ended = cluster.wait_for_end(warned.job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), warned.log
    assert warned.events == ["start", "saved", "start", "done"]
    warned.assert_complete()
    assert cluster.wait_for_end(requeued.job)["Restarts"] == "1"
    assert requeued.events == ["start", "left", "start", "done"], requeued.log
    requeued.assert_complete()

    assert cluster.wait_for_end(stopped.job)["Restarts"] == "0", stopped.log
    assert stopped.events == ["start", "stopped"]
    again = submit_stand_in(stopped.folder, repository, nodes=1)
    assert again.submission.path.name == "002"
    cluster.wait_for_end(again.job)
    again.assert_complete()
    assert again.events == ["start", "done"]


def test_the_time_limit(cluster: Cluster, start: Start) -> None:
    """SLURM warns a job of a minute within its first half; it saves and continues in another attempt."""
    run = start("limited", {"steps": 400, "interval": 1000}, time="1", warning_seconds=60, nodes=1)
    ended = cluster.wait_for_end(run.job, 180)
    restarts = int(ended["Restarts"])
    assert ended["JobState"] == "COMPLETED"
    assert restarts >= 1, run.log
    assert run.events == [*["start", "saved"] * restarts, "start", "done"]
    run.assert_complete()


@pytest.fixture
def grace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[int]:
    """Seconds that SLURM gives a job before it is preempted, warning it as before its time limit."""
    if request.param:
        cluster.do("reconfigure", str(request.param), "preempt_send_user_signal")
    yield request.param
    if request.param:
        cluster.do("reconfigure", "0", "")


@pytest.mark.parametrize("grace", [0, 20], indirect=True)
def test_preemption(cluster: Cluster, start: Start, grace: int) -> None:
    """A job of a higher partition takes the nodes; the run saves, and continues where it was."""
    run = start("preempted", {"interval": 1000, "steps": 100}, nodes=3)
    run.wait_for_start()
    cluster.command("srun", "--partition=high", "--nodes=3", "--ntasks=3", "--exclusive", "true")
    run.wait_for_second_attempt("the end of the job that took its nodes")
    ended = cluster.wait_for_end(run.job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), run.log
    assert run.events == ["start", "saved" if grace else "left", "start", "done"], run.log
    run.assert_complete()
    first, last = (run.folder / "saves").read_text().splitlines()
    assert first.startswith("0 "), "saved when it was told to go"
    assert last == "1 100"


def test_what_is_cancelled_has_saved(cluster: Cluster, start: Start, repository: Path) -> None:
    """By a person, and by SLURM for a job of a higher partition: gone, until it is submitted again."""
    plan = {"interval": 1000, "steps": 60}
    by_person = start("scancelled", plan, nodes=1)
    by_slurm = start("preempted", plan, nodes=2, site={"partition": "spot"})
    for run in (by_person, by_slurm):
        run.wait_for_start()
    cluster.command("scancel", str(by_person.job))
    cluster.wait_for_end(by_person.job)
    cluster.command("srun", "--partition=high", "--nodes=3", "--ntasks=3", "--exclusive", "true")
    for run, state in ((by_person, "CANCELLED"), (by_slurm, "PREEMPTED")):
        ended = cluster.wait_for_end(run.job)
        assert (ended["JobState"], ended["Restarts"]) == (state, "0"), run.log
        assert run.events == ["start", "left"], run.log
        assert len((run.folder / "saves").read_text().splitlines()) == 1, "saved when it was told to go"
        status = read_status(run.folder)
        assert (status.state, status.is_live) == (state, False)
        again = submit_stand_in(run.folder, repository, nodes=1)
        cluster.wait_for_end(again.job)
        again.assert_complete()
        first, last = (run.folder / "saves").read_text().splitlines()
        assert last == "0 60"
        assert int(first.split()[1]) < 60


@pytest.mark.parametrize("what", ["batch host", "another node", "slurmd of the batch host"])
def test_a_node_that_dies(cluster: Cluster, start: Start, what: str) -> None:
    """Its job comes back on other nodes by itself. What a slurmd left alive notices that it is not wanted."""
    lives_on = what == "slurmd of the batch host"
    run = start("orphaned", {"steps": 400 if lives_on else 60})
    run.wait_for_steps(10)
    hosts = cluster.command("scontrol", "show", "hostnames", cluster.wait(run.job, bool)["NodeList"]).split()
    cluster.do("kill-slurmd" if lives_on else "kill-node", hosts[1 if what == "another node" else 0])
    run.wait_for_second_attempt(f"the death of {what}")
    ended = cluster.wait_for_end(run.job, 120)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), run.log
    run.assert_complete()
    assert run.events[-2:] == ["start", "done"]
    attempts = [int(line.split()[0]) for line in (run.folder / "saves").read_text().splitlines()]
    assert attempts == sorted(attempts), "an attempt that was given up on saved after the next had begun"
