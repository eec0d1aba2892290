"""Where the time of a layer and of a step goes."""

import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from skipmega.experiments.speed.bench import Bench, precision, release_memory
from skipmega.experiments.speed.layers import DENSE, own_stack
from skipmega.experiments.step_times import now, random_batches
from skipmega.training.engine import TrainingEngine
from skipmega.training.metrics import peak_memory_gib
from skipmega.training.sums import StepSums

PARTS = {
    "matrix": ("gemm", "cutlass", "nvjet", "xmma", "cublas"),
    "attention": ("flash", "fmha", "flex", "cudnn", "attention"),
    "Triton, fused by the compiler": ("triton_",),
}
LINES = 40


def profile_layers(bench: Bench, output: Path) -> str:
    """Kernels of dense and routed stacks by time: a table in all, and each kernel in ``profile-*.txt``."""
    output.mkdir(parents=True, exist_ok=True)
    lines = ["| layers | ms a layer | " + " | ".join([*PARTS, "other", "kernels"]) + " |", "|---" * 7 + "|"]
    rows = {"dense": DENSE, **{f"P={p}": [f"routing.density={p}"] for p in (0.5, 0.25, 0.125)}}
    for name, overrides in rows.items():
        config = bench.config(f"model.num_layers={bench.layers}", *overrides)
        _, run = own_stack(config, bench.grid)
        shape = (config.data.sequence_length, config.training.micro_batch_size, config.model.hidden_size)
        hidden = torch.randn(shape, device=bench.grid.device, dtype=precision(config), requires_grad=True)

        def once(
            run: Callable[..., tuple[torch.Tensor, object]] = run, inputs: torch.Tensor = hidden
        ) -> None:
            run(inputs)[0].sum().backward()

        for _ in range(bench.warmup):
            once()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            once()
            if bench.grid.device.type == "cuda":
                torch.cuda.synchronize()
        times, launched = _kernels(seen, _file(output, "profile", name))
        cells = [f"{times[part] / bench.layers:.2f}" for part in (*PARTS, "other")]
        total = sum(times.values()) / bench.layers
        lines.append(
            f"| {name} | {total:.2f} | " + " | ".join([*cells, f"{launched / bench.layers:.0f}"]) + " |"
        )
    return "\n".join(lines) + "\n"


def profile_steps(bench: Bench, output: Path) -> str:
    """Kernels of whole steps of ``bench.layers`` layers, dense and at P=0.25, by time: a table in all, and
    each kernel in ``profile-step-*.txt``. Steps are timed without the profiler."""
    output.mkdir(parents=True, exist_ok=True)
    head = ["step of", "ms", "fastest", "GPU busy", *PARTS, "other", "kernels", "peak GiB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, overrides in {"dense": DENSE, "P=0.25": ["routing.density=0.25"]}.items():
        config = bench.config(f"model.num_layers={bench.layers}", *overrides)
        device = bench.grid.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        engine, batches = TrainingEngine(config, bench.grid), random_batches(config, bench.grid)
        sums, times = StepSums.zeros(config, bench.grid), []
        for step in range(2 + bench.steps):
            start = now(device)
            engine.train_step(batches, step, config.optimizer.learning_rate, sums)
            times.append(1e3 * (now(device) - start))
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            engine.train_step(batches, len(times), config.optimizer.learning_rate, sums)
            now(device)
        parts, launched = _kernels(seen, _file(output, "profile-step", name))
        by_part = [f"{parts[part]:.1f}" for part in (*PARTS, "other")]
        steps, peak = times[2:], peak_memory_gib(device) or 0.0
        whole = [f"{t:.1f}" for t in (statistics.median(steps), min(steps), sum(parts.values()))]
        lines.append("| " + " | ".join([name, *whole, *by_part, str(launched), f"{peak:.1f}"]) + " |")
        engine.close()
        del engine
        release_memory(device)
    return "\n".join(lines) + "\n"


def _file(output: Path, what: str, row: str) -> Path:
    return output / f"{what}-{row.replace('=', '')}.txt"


def _kernels(seen: Any, path: Path) -> tuple[dict[str, float], int]:
    """Milliseconds of the kernels of each part, and how many were launched; each kernel goes to ``path``."""
    kernels = seen.key_averages()
    path.write_text(
        kernels.table(sort_by="self_device_time_total", row_limit=LINES, max_name_column_width=90)
    )
    times: dict[str, float] = defaultdict(float)
    launched = 0
    for event in kernels:
        if event.device_type.name == "CUDA":
            times[_part(event.key)] += event.self_device_time_total / 1e3
            launched += event.count
    return times, launched


def _part(kernel: str) -> str:
    """Attention first, since its kernels may be compiler-made too."""
    name = kernel.lower()
    for part in ("attention", "matrix", "Triton, fused by the compiler"):
        if any(word in name for word in PARTS[part]):
            return part
    return "other"
