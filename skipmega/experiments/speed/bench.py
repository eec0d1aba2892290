"""What all measurements share: the configuration, the clock, and records that a later call continues."""

import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skipmega.config import RunConfig, load_config, resolve_grid, resolve_vocabulary
from skipmega.parallel.grid import ParallelGrid

GROUPED = ["model.num_key_value_heads=4"]
LIBRARIES = ("torch", "triton", "deepspeed", "megatron-core", "transformers")


@dataclass(frozen=True)
class Bench:
    """A measurement's setting.

    ``overrides`` come before those of a row. Stacks have ``layers`` layers; every run is repeated ``repeats``
    times after ``warmup`` that count nothing; steps are measured ``steps`` times after one.
    """

    base: Path
    overrides: list[str]
    grid: ParallelGrid
    layers: int = 4
    repeats: int = 10
    warmup: int = 3
    steps: int = 3

    def config(self, *overrides: str) -> RunConfig:
        """The base configuration with a row's overrides, resolved for this grid."""
        config = load_config(self.base, [*self.overrides, *overrides])
        return resolve_grid(resolve_vocabulary(config, None), self.grid.world_size)

    def with_few_repeats(self) -> "Bench":
        """The same for whole steps."""
        return replace(self, warmup=1, repeats=self.steps)


class Row(NamedTuple):
    """One measurement: its ``mode`` and ``name`` are the key of its record."""

    mode: str
    name: str
    measure: Callable[[Bench], dict[str, Any]]


def run_rows(rows: Iterable[Row], bench: Bench, output: Path, deadline: float | None) -> None:
    """Measure what ``output`` has no record of, in order; a row that fails is reported and leaves none.

    Args:
        rows: the dearest to know first.
        bench: the setting.
        output: folder of ``speed.jsonl``.
        deadline: no row begins after so many seconds; None for no limit.
    """
    output.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    done = {(record["mode"], record["row"]) for record in read_records(output)}
    about = environment(bench.grid.device)
    for row in rows:
        if (row.mode, row.name) in done:
            continue
        if deadline is not None and time.monotonic() - begun > deadline:
            print(f"{row.mode} {row.name}: not begun, the deadline has passed", flush=True)
            continue
        start = time.monotonic()
        try:
            measured = row.measure(bench)
        except Exception as error:  # peers need compilers and kernels that a machine may lack
            print(f"{row.mode} {row.name}: FAILED, {type(error).__name__}: {error}"[:2000], flush=True)
            continue
        finally:
            release_memory(bench.grid.device)
        record = {"mode": row.mode, "row": row.name, **measured, **about, "took": time.monotonic() - start}
        print(json.dumps({key: record[key] for key in record if key not in about}), flush=True)
        with (output / "speed.jsonl").open("a") as stream:
            stream.write(json.dumps(record) + "\n")


def read_records(output: Path) -> list[dict[str, Any]]:
    """What has been measured so far, the newest last."""
    path = output / "speed.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def environment(device: torch.device) -> dict[str, str]:
    """Where and of what: device, versions, commit, date."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device": name,
        "versions": ", ".join(f"{library} {_version(library)}" for library in LIBRARIES),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def timed(run: Callable[[], Any], bench: Bench) -> dict[str, float]:
    """Median and extremes of ``run``'s seconds, on the device's own clock where it has one.

    On a GPU runs are queued one behind the other, so that a host too slow to keep it busy shows.
    """
    for _ in range(bench.warmup):
        run()
    if bench.grid.device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(bench.repeats + 1)]
        torch.cuda.synchronize(bench.grid.device)
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize(bench.grid.device)
        times = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
    else:
        times = []
        for _ in range(bench.repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return spread(times)


def spread(times: Sequence[float]) -> dict[str, float]:
    """The fields of a record that tell seconds."""
    return {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}


def time_backward(
    run: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    hidden: Tensor,
    bench: Bench,
    captured: bool = False,
) -> dict[str, float]:
    """Seconds of ``run``, forward and backward, and the most memory that its forward adds.

    Args:
        run: from ``hidden`` to its shape.
        parameters: whose gradients are made anew each time.
        hidden: an input that asks for its gradient.
        bench: the setting.
        captured: run both passes as one CUDA graph.
    """
    upstream = torch.randn_like(hidden)

    def once() -> None:
        torch.autograd.grad(run(hidden), [hidden, *parameters], upstream, allow_unused=True)

    measured: dict[str, float] = timed(_capture(once, bench) if captured else once, bench)
    measured["captured"] = captured
    if bench.grid.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = run(hidden)
        measured["activation_bytes"] = torch.cuda.max_memory_allocated() - before
        del out
    return measured


def _capture(once: Callable[[], Any], bench: Bench) -> Callable[[], Any]:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(bench.warmup):
            once()
    with torch.cuda.graph(graph, stream=stream):
        once()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def precision(config: RunConfig) -> torch.dtype:
    """What layers compute in."""
    return torch.bfloat16 if config.training.precision == "bf16" else torch.float32


def fill(parameters: Iterable[Tensor]) -> None:
    """Weights of the usual size, where they are: vectors one, matrices small and random."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(std=0.02)


def release_memory(device: torch.device) -> None:
    """Forget compiled programs and free what the last row held."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
