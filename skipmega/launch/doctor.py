"""Is every node fit to train? Checks of each process on its node, then of all processes together.

A finding names the node. What is fatal keeps a run from starting; the rest is worth knowing.
"""

import os
import resource
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import pynvml
import torch
import torch.distributed as dist
from packaging.specifiers import SpecifierSet

from skipmega.config import RunConfig
from skipmega.data.files import find_pairs
from skipmega.errors import DataError
from skipmega.launch.estimate import GIB, with_vocabulary
from skipmega.launch.gpu_health import GpuHealth, read_health
from skipmega.models.flops import count_parameters
from skipmega.parallel.grid import Axis, ParallelGrid

T = TypeVar("T")
# versions that the tests and the GPU runs have seen together
TESTED = {"torch": ">=2.11,<2.14", "deepspeed": ">=0.19.8,<0.20", "megatron-core": ">=0.16.1,<0.17"}
_CHECKPOINT_BYTES = 12  # of a weight: fp32 master and two moments
_OPEN_FILES = 4096
_CLOCK_SECONDS = 5.0
_USED_GIB = 1.5  # of a GPU, this process's context and a stranger's included
_REDUCED = {"cuda": 1 << 25, "cpu": 1 << 20}  # fp32 elements
# size and type of square matrices, and how many products of them
_PRODUCTS = {"cuda": (8192, torch.bfloat16, 50), "cpu": (512, torch.float32, 5)}
_BUSY = 5  # times that work: less than half a second, which NVML's answers may take
_SLOW = 0.5  # of the median over all processes


@dataclass(frozen=True)
class Finding:
    """Something wrong on a node."""

    node: str
    message: str
    fatal: bool

    def __str__(self) -> str:
        return f"{'BAD NODE' if self.fatal else 'warning'} {self.node}: {self.message}"


def check_node(config: RunConfig | None) -> list[Finding]:
    """What this process sees alone; no communication.

    Args:
        config: the run that is to start here; left out, its folders and data are not looked at.
    """
    found = [(message, False) for message in (*_versions(), *_limits(), *_locks())]
    if config is not None:
        # how much space is needed follows from the tokenizer
        found += [(message, True) for message in list(_unseen(config)) or _space(config)]
    return [Finding(_node(), message, fatal) for message, fatal in found]


def examine_gpu(device: torch.device) -> GpuHealth | str:
    """The health of this process's GPU, at work; or why it is not available."""
    if device.type != "cuda":
        return "no GPU"
    for _ in range(_BUSY):
        _multiply(device)  # only queued: what holds clocks back shows under load
    try:
        return read_health(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError as error:
        return f"{error}"


def describe_health(health: GpuHealth | str) -> str:
    """One line."""
    return (
        f"GPU health: {health.describe() if isinstance(health, GpuHealth) else f'not available ({health})'}"
    )


def check_device(device: torch.device, health: GpuHealth | str) -> list[Finding]:
    """Free memory of this process's GPU, whether it computes, and its health; nothing on a CPU."""
    if device.type != "cuda":
        return []
    found = []
    free, total = torch.cuda.mem_get_info(device)
    used = (total - free - torch.cuda.memory_reserved(device)) / GIB
    if used > _USED_GIB:
        found.append((f"{device} has {used:.1f} of {total / GIB:.1f} GiB in use by others", True))
    if not _multiplies_rightly(device):
        found.append((f"{device} multiplies small whole numbers wrongly", True))
    if isinstance(health, GpuHealth):
        found += [(f"{device}: {message}", fatal) for message, fatal in health.complaints()]
    return [Finding(_node(), message, fatal) for message, fatal in found]


def _multiplies_rightly(device: torch.device) -> bool:
    row = torch.arange(512, device=device, dtype=torch.float32) % 7
    product = (row[:, None].bfloat16() @ row[None].bfloat16()).float()
    return torch.equal(product, row[:, None] * row[None])


def check_together(grid: ParallelGrid, folder: Path) -> list[Finding]:
    """What shows between processes: clocks, the shared folder, the speed of each device, sums and their speed
    over each group.

    Every process of the grid calls it; the first one's answer holds the findings of all, and it prints the
    slowest device, and the slowest group of each axis.

    Args:
        folder: one that all nodes are to share.
    """
    nodes = _gathered(_node())
    found = _skewed(nodes) + _products(grid)
    if grid.world_size > 1:
        found += _strangers(grid, folder)
    for name in ("tensor", "context", "pipeline", "replicas"):
        axis: Axis = getattr(grid, name)
        if any(_gathered(axis.size > 1)):
            found += _sums(grid, name, axis)
    every = _gathered(found)
    return list(dict.fromkeys(finding for some in every for finding in some))


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _versions() -> Iterator[str]:
    for name, tested in TESTED.items():
        version = metadata.version(name)
        if not SpecifierSet(tested).contains(version.split("+")[0]):
            yield f"{name} {version} is untested: the tests ran with {tested}"


def _limits() -> Iterator[str]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _OPEN_FILES:
        yield f"ulimit -n is {files}: loaders and connections may need {_OPEN_FILES}"
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if torch.cuda.is_available() and locked != resource.RLIM_INFINITY:
        yield f"ulimit -l is {locked // 1024} KiB: InfiniBand needs unlimited"


def _locks() -> Iterator[str]:
    """A process killed while it built an extension leaves a lock that every later one waits for."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    for lock in sorted(folder.rglob("lock")):
        yield f"{lock} is left over, unless one is being built now: remove it, or processes wait for ever"


def _unseen(config: RunConfig) -> Iterator[str]:
    data = config.data
    sources = (*data.train, *data.valid)
    try:
        pairs = [prefix for source in sources for prefix in find_pairs(source.path)]
    except DataError as error:
        yield str(error)
        return
    wanted = [f"{prefix}.{end}" for prefix in pairs for end in ("bin", "idx")]
    for path in (*([data.tokenizer] if data.tokenizer else []), *wanted):
        if not Path(path).is_file():
            yield f"{path} cannot be seen from here: is the shared folder mounted?"


def _space(config: RunConfig) -> Iterator[str]:
    needed = count_parameters(with_vocabulary(config)) * _CHECKPOINT_BYTES
    run = Path(config.run_dir).absolute()
    folder = next(path for path in (run, *run.parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        yield f"{folder} has {free / GIB:.1f} GiB free, and one checkpoint takes {needed / GIB:.1f}"


def _skewed(nodes: list[str]) -> list[Finding]:
    dist.barrier()
    clocks = _gathered(time.time())
    middle = statistics.median(clocks)
    return [
        Finding(node, f"its clock is {clock - middle:+.1f} s off", fatal=False)
        for node, clock in zip(nodes, clocks, strict=True)
        if abs(clock - middle) > _CLOCK_SECONDS
    ]


def _strangers(grid: ParallelGrid, folder: Path) -> list[Finding]:
    """Nodes that do not see what the first process writes into the folder, within half a minute."""
    mark = folder / f".doctor-{_gathered(os.getpid())[0]}"
    if grid.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    dist.barrier()
    end = time.monotonic() + 30
    while not (seen := mark.exists()) and time.monotonic() < end:
        time.sleep(0.5)
    dist.barrier()
    if grid.rank == 0:
        mark.unlink(missing_ok=True)
    return (
        [] if seen else [Finding(_node(), f"{folder} is not the folder that the first node has", fatal=True)]
    )


def _products(grid: ParallelGrid) -> list[Finding]:
    """Matrix products, on every device at once: none far behind the others."""
    _multiply(grid.device)
    seconds = _time(grid, lambda: _multiply(grid.device))
    size, _, count = _PRODUCTS[grid.device.type]
    return _compare(grid, "matrix products", 2 * size**3 * count / seconds / 1e12, "TFLOP/s")


def _multiply(device: torch.device) -> None:
    size, dtype, count = _PRODUCTS[device.type]
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    for _ in range(count):
        matrix @ matrix


def _sums(grid: ParallelGrid, name: str, axis: Axis) -> list[Finding]:
    """All-reduce over the groups of one axis, all at once: exact sums, and no group far behind the others."""
    numbers = torch.full((_REDUCED[grid.device.type],), float(axis.rank + 1), device=grid.device)
    dist.all_reduce(numbers.clone(), group=axis.group)  # connects
    seconds = _time(grid, lambda: dist.all_reduce(numbers, group=axis.group))
    right = bool((numbers == axis.size * (axis.size + 1) / 2).all())
    found = [] if right else [Finding(_node(), f"an all-reduce over {name} gave a wrong sum", fatal=True)]
    speed = numbers.numel() * numbers.element_size() / seconds / 1e9
    return found + _compare(grid, f"all-reduce over {name} ({axis.size})", speed, "GB/s")


def _compare(grid: ParallelGrid, what: str, speed: float, unit: str) -> list[Finding]:
    speeds = _gathered(speed)
    if grid.rank == 0:
        print(f"{what}: {min(speeds):.3g} to {max(speeds):.3g} {unit}", flush=True)
    usual = statistics.median(speeds)
    if speed >= _SLOW * usual:
        return []
    return [Finding(_node(), f"{what} at {speed:.3g} {unit}, where {usual:.3g} is usual", fatal=False)]


def _time(grid: ParallelGrid, work: Callable[[], object]) -> float:
    """Seconds that the device takes for it."""
    _synchronize(grid)
    began = time.perf_counter()
    work()
    _synchronize(grid)
    return time.perf_counter() - began


def _synchronize(grid: ParallelGrid) -> None:
    if grid.device.type == "cuda":
        torch.cuda.synchronize(grid.device)


def _gathered(value: T) -> list[T]:
    """``value`` of every process, by rank."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
