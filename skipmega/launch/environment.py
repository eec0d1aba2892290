"""Which process am I? The one place that reads what launchers leave in the environment.

torchrun and the deepspeed launcher set torch's five variables; srun numbers its tasks in ``SLURM_*``; mpirun
is asked through mpi4py. A launcher within another (torchrun in tasks of srun, say) is right when there is one
in every task of the outer, and they know of each other.
"""

import os
import re
import socket
from dataclasses import dataclass

from skipmega.errors import ConfigError
from skipmega.parallel.process import ProcessInfo

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# number of processes that started workers, as torchrun and the deepspeed launcher tell these
_STARTERS = {"torchrun": "GROUP_WORLD_SIZE", "deepspeed": "CROSS_SIZE"}
# rank and size as Open MPI and as MPICH's family tell them, and a variable that only their mpirun sets
_MPI_VARIABLES = {
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPI_LOCALNRANKS": ("PMI_RANK", "PMI_SIZE"),
}
# below what Linux gives to outgoing connections
_FIRST_PORT, _PORTS = 12_000, 20_000


def discover_process() -> ProcessInfo:
    """Find this process's place in the job, and set torch's variables for the libraries that read only those.

    Raises:
        ConfigError: variables are missing or not numbers, two launchers disagree, mpirun has another MPI than
            mpi4py, or an allocation of several tasks is not used by any launcher.
    """
    tasks = _outer_tasks()
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return _check_nesting(_read_torch_variables(), tasks)
    if tasks is None:
        _refuse_unused_tasks()
        return ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="none")
    process, address, port = (
        _meet_through_srun(tasks) if tasks.launcher == "srun" else _meet_through_mpi(tasks)
    )
    os.environ.update(
        RANK=str(process.rank), WORLD_SIZE=str(process.world_size), LOCAL_RANK=str(process.local_rank)
    )
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(port))
    return process


@dataclass(frozen=True)
class _Tasks:
    """What started this process's tree on several nodes: srun or mpirun, and the task that this is."""

    launcher: str
    rank: int
    world_size: int


def _outer_tasks() -> _Tasks | None:
    """The task of mpirun or srun that this process is in; mpirun may itself have used srun to reach nodes."""
    for mark, (rank, size) in _MPI_VARIABLES.items():
        if mark in os.environ:
            return _Tasks("mpirun", _number(rank, "mpirun"), _number(size, "mpirun"))
    if "SLURM_STEP_ID" in os.environ:
        size = "SLURM_STEP_NUM_TASKS"
        return _Tasks("srun", _number("SLURM_PROCID", "srun"), _number(size, "srun"))
    return None


def _read_torch_variables() -> ProcessInfo:
    found = [name for name in TORCH_VARIABLES if name in os.environ]
    missing = [name for name in TORCH_VARIABLES if name not in found]
    if missing:
        raise ConfigError(
            f"the launcher set {', '.join(found)} but not {', '.join(missing)}: start with torchrun, or "
            "unset them to run as one process"
        )
    rank, size, local = (_number(name, "torchrun") for name in TORCH_VARIABLES[:3])
    if rank >= size:
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={size}: start with torchrun, or unset both")
    return ProcessInfo(rank, size, local, "deepspeed" if "CROSS_SIZE" in os.environ else "torchrun")


def _check_nesting(process: ProcessInfo, tasks: _Tasks | None) -> ProcessInfo:
    """Refuse torch's variables that do not belong to the tasks around this process."""
    if tasks is None or tasks.world_size == 1:
        return process
    started = f"{tasks.launcher} started {tasks.world_size} tasks"
    counter = _STARTERS[process.launcher]
    if counter in os.environ:
        joined = _number(counter, process.launcher)
        if joined != tasks.world_size:
            raise ConfigError(
                f"two launchers at once: {started}, and each started {process.launcher}, which knows of "
                f"{joined} ({counter}): start one task per node and tell {process.launcher} the number of "
                f"nodes, or leave {process.launcher} out"
            )
        return process
    if (process.rank, process.world_size) != (tasks.rank, tasks.world_size):
        raise ConfigError(
            f"{started}, of which this is task {tasks.rank}, but RANK={process.rank} and "
            f"WORLD_SIZE={process.world_size} are set: unset them, {tasks.launcher} is enough"
        )
    return ProcessInfo(process.rank, process.world_size, process.local_rank, tasks.launcher)


def _refuse_unused_tasks() -> None:
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in os.environ and tasks != "1":
        raise ConfigError(
            f"SLURM_NTASKS={tasks}, but no launcher started this process, which would train alone: put srun "
            "before the command, or `srun --ntasks=1` if one process is meant"
        )


def _meet_through_srun(tasks: _Tasks) -> tuple[ProcessInfo, str, int]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    sees_one = visible != "" and "," not in visible  # --gpus-per-task: each task sees its own alone
    local = 0 if sees_one else _number("SLURM_LOCALID", "srun")
    try:
        address = first_host(os.environ["SLURM_STEP_NODELIST"])
    except KeyError as missing:
        raise ConfigError(f"srun did not set {missing.args[0]}: start with srun or torchrun") from None
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    job, step = _number("SLURM_JOB_ID", "srun"), _number("SLURM_STEP_ID", "srun")
    port = _FIRST_PORT + (31 * job + 7 * attempt + step) % _PORTS
    return ProcessInfo(tasks.rank, tasks.world_size, local, "srun"), address, port


def _meet_through_mpi(tasks: _Tasks) -> tuple[ProcessInfo, str, int]:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"mpirun started this process, and mpi4py cannot be used ({error}): pip install 'skipmega[mpi]', "
            "or start with srun or torchrun"
        ) from None
    world = MPI.COMM_WORLD
    if world.size != tasks.world_size:
        raise ConfigError(
            f"mpirun started {tasks.world_size} processes, but mpi4py sees {world.size}: it was built with "
            "another MPI; pip install --no-binary=mpi4py --force-reinstall mpi4py"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED).rank
    address, port = world.bcast((socket.gethostname(), _free_port()) if world.rank == 0 else None)
    return ProcessInfo(world.rank, world.size, local, "mpirun"), address, port


def first_host(nodelist: str) -> str:
    """The first name of SLURM's notation for hosts: ``node03`` of ``node[03-05,9],login``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""


def _number(name: str, launcher: str) -> int:
    value = os.environ.get(name)
    if value is None:
        raise ConfigError(
            f"{launcher} did not set {name}: start with torchrun or srun, or unset its variables"
        )
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"{name}={value!r} is not a whole number: start with {launcher}, or unset it")
    return int(value)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
