"""Which process am I: the launcher's variables read, or refused by name."""

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipmega.errors import ConfigError
from skipmega.launch.environment import discover_process, first_host
from skipmega.parallel.process import ProcessInfo

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}

# one task of `srun --nodes 2 --ntasks-per-node 2`, as SLURM 22.05 sets them
SRUN = {
    "SLURM_JOB_ID": "812",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[03-04]",
}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without a launcher's variables, put back in the end."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_")) and name not in TORCHRUN
    }
    monkeypatch.setattr(os, "environ", kept)
    return monkeypatch


def put(environment: pytest.MonkeyPatch, *groups: dict[str, str], **more: str) -> None:
    for group in (*groups, more):
        for name, value in group.items():
            environment.setitem(os.environ, name, value)


def test_without_a_launcher_it_is_a_job_of_one(environment: pytest.MonkeyPatch) -> None:
    process = discover_process()
    assert process == ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="none")
    assert process.is_alone


def test_a_left_over_master_address_starts_no_job(environment: pytest.MonkeyPatch) -> None:
    environment.setitem(os.environ, "MASTER_ADDR", "node0")
    assert discover_process().is_alone


def test_torchrun_s_variables_are_read(environment: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        environment.setitem(os.environ, name, value)
    process = discover_process()
    assert process == ProcessInfo(rank=5, world_size=8, local_rank=1, launcher="torchrun")
    assert not process.is_alone


@pytest.mark.parametrize("missing", TORCHRUN)
def test_an_incomplete_set_is_refused_by_what_is_missing(
    environment: pytest.MonkeyPatch, missing: str
) -> None:
    for name, value in TORCHRUN.items():
        if name != missing:
            environment.setitem(os.environ, name, value)
    with pytest.raises(ConfigError, match=rf"but not {missing}: start with torchrun"):
        discover_process()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["", "two", "-1", "1.0"])
def test_what_is_not_a_whole_number_is_refused(
    environment: pytest.MonkeyPatch, name: str, value: str
) -> None:
    for other, number in TORCHRUN.items():
        environment.setitem(os.environ, other, number)
    environment.setitem(os.environ, name, value)
    with pytest.raises(ConfigError) as refused:
        discover_process()
    assert f"{name}={value!r} is not a whole number" in str(refused.value)


def test_a_rank_outside_the_world_is_refused(environment: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "9", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"
    }.items():  # fmt: skip
        environment.setitem(os.environ, name, value)
    with pytest.raises(ConfigError, match="RANK=9 is not below WORLD_SIZE=2"):
        discover_process()


def test_tasks_of_srun_are_numbered_and_meet_on_the_first_node(environment: pytest.MonkeyPatch) -> None:
    put(environment, SRUN)
    assert discover_process() == ProcessInfo(rank=3, world_size=4, local_rank=1, launcher="srun")
    torch_reads = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]
    assert torch_reads == ["3", "4", "1", "node03"]
    port = int(os.environ["MASTER_PORT"])
    assert 12_000 <= port < 32_000
    assert discover_process().launcher == "srun", "asked again, with torch's variables set"
    for name in TORCHRUN:
        del os.environ[name]
    put(environment, SLURM_RESTART_COUNT="1")
    discover_process()
    assert int(os.environ["MASTER_PORT"]) != port, "an attempt does not meet what is left of the one before"


def test_a_given_meeting_point_is_kept(environment: pytest.MonkeyPatch) -> None:
    put(environment, SRUN, MASTER_ADDR="node03-ib", MASTER_PORT="4000")
    discover_process()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node03-ib", "4000")


@pytest.mark.parametrize(("visible", "local"), [("0,1", 1), ("0", 0), ("MIG-1", 0)])
def test_a_task_with_one_visible_gpu_takes_that(
    environment: pytest.MonkeyPatch, visible: str, local: int
) -> None:
    put(environment, SRUN, CUDA_VISIBLE_DEVICES=visible)
    assert discover_process().local_rank == local


@pytest.mark.parametrize(
    "name", ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST"]
)
def test_what_srun_did_not_set_is_named(environment: pytest.MonkeyPatch, name: str) -> None:
    put(environment, {key: value for key, value in SRUN.items() if key != name})
    with pytest.raises(ConfigError, match=f"srun did not set {name}"):
        discover_process()


def test_an_allocation_that_no_launcher_uses_is_refused(environment: pytest.MonkeyPatch) -> None:
    """In a batch script SLURM numbers the script itself as task 0."""
    put(environment, SLURM_JOB_ID="812", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0")
    with pytest.raises(ConfigError, match=r"SLURM_NTASKS=4, but no launcher .* put srun before the command"):
        discover_process()
    put(environment, SLURM_NTASKS="1")
    assert discover_process().is_alone


@pytest.mark.parametrize("tasks", [SRUN, MPIRUN])
@pytest.mark.parametrize(("name", "counter"), [("torchrun", "GROUP_WORLD_SIZE"), ("deepspeed", "CROSS_SIZE")])
def test_a_launcher_in_every_task_of_another(
    environment: pytest.MonkeyPatch, tasks: dict[str, str], name: str, counter: str
) -> None:
    """Right if they know of each other; otherwise each would be a world of its own in one run folder."""
    put(environment, tasks, TORCHRUN, {counter: "4"})
    assert discover_process() == ProcessInfo(rank=5, world_size=8, local_rank=1, launcher=name)
    put(environment, {counter: "1"})
    with pytest.raises(ConfigError, match=rf"two launchers at once: .* started 4 tasks.*{name}.* knows of 1"):
        discover_process()


def test_one_task_may_start_any_launcher(environment: pytest.MonkeyPatch) -> None:
    put(environment, SRUN, TORCHRUN, SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0", GROUP_WORLD_SIZE="2")
    assert discover_process().launcher == "torchrun"


@pytest.mark.parametrize(("tasks", "name"), [(SRUN, "srun"), (MPIRUN, "mpirun")])
def test_left_over_variables_that_contradict_the_launcher_are_refused(
    environment: pytest.MonkeyPatch, tasks: dict[str, str], name: str
) -> None:
    put(environment, tasks, TORCHRUN)
    with pytest.raises(ConfigError, match=rf"{name} started 4 tasks, of which this is task 3, but RANK=5"):
        discover_process()
    put(environment, RANK="3", WORLD_SIZE="4")
    assert discover_process().launcher == name


class FakeCommunicator:
    """What :func:`discover_process` asks of an MPI world."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def Split_type(self, kind: int) -> "FakeCommunicator":  # noqa: N802
        return FakeCommunicator(self.rank % 2, 2)

    def bcast(self, value: Any) -> Any:
        assert (value is None) == (self.rank > 0), "the first process chooses"
        return value or ("node7", 4001)


@pytest.mark.parametrize("rank", [0, 3])
def test_mpirun_is_asked_through_mpi4py(environment: pytest.MonkeyPatch, rank: int) -> None:
    mpi = SimpleNamespace(COMM_WORLD=FakeCommunicator(rank, 4), COMM_TYPE_SHARED=0)
    environment.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
    put(environment, MPIRUN, SRUN, OMPI_COMM_WORLD_RANK=str(rank))
    assert discover_process() == ProcessInfo(rank, 4, local_rank=rank % 2, launcher="mpirun")
    assert os.environ["RANK"] == str(rank)
    if rank:
        assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node7", "4001")


def test_an_mpi4py_of_another_mpi_is_named(environment: pytest.MonkeyPatch) -> None:
    mpi = SimpleNamespace(COMM_WORLD=FakeCommunicator(0, 1), COMM_TYPE_SHARED=0)
    environment.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
    put(environment, MPIRUN)
    with pytest.raises(
        ConfigError, match="started 4 processes, but mpi4py sees 1: it was built with another"
    ):
        discover_process()


def test_mpirun_without_mpi4py_names_the_extra(environment: pytest.MonkeyPatch) -> None:
    environment.setitem(sys.modules, "mpi4py", None)
    put(environment, MPIRUN)
    with pytest.raises(ConfigError, match=r"pip install 'skipmega\[mpi\]'"):
        discover_process()


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[3-5,9],m", "n3"),
        ("r[01,3]n[7-8]-ib,x", "r01n7-ib"),
        ("gpu-a01,b", "gpu-a01"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@given(st.integers(0, 999), st.integers(1, 9), st.integers(1, 4), st.sampled_from(["node", "gpu-a", "r1-n"]))
def test_first_host_of_a_range_keeps_its_zeros(first: int, more: int, width: int, prefix: str) -> None:
    low, high = f"{first:0{width}d}", f"{first + more:0{width}d}"
    assert first_host(f"{prefix}[{low}-{high},1234],other") == f"{prefix}{low}"
