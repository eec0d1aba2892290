"""From what the engine saw to the numbers of a log record."""

import resource
import sys
import time

import torch

from skipmega.config import RunConfig
from skipmega.models.flops import training_flops_per_token
from skipmega.training.engine import Averages

TERA = 1e12


class StepTimer:
    """Seconds spent on training steps since the last reading; evaluation and saving are left out."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._resumed = time.perf_counter()

    def pause(self) -> None:
        """Something other than training begins."""
        self._seconds += time.perf_counter() - self._resumed

    def resume(self) -> None:
        """Training goes on."""
        self._resumed = time.perf_counter()

    def read(self) -> float:
        """Seconds so far; the count starts again at zero."""
        self.pause()
        seconds, self._seconds = self._seconds, 0.0
        self.resume()
        return seconds


def routed_layers(config: RunConfig) -> list[int]:
    """Global numbers of the layers that have a router."""
    return [layer for layer in range(config.model.num_layers) if config.layer_is_routed(layer)]


def routing_numbers(config: RunConfig, seen: Averages) -> dict[str, list[float] | list[int]]:
    """Per routed layer: ``density`` (share of tokens chosen) and ``dropped`` (share of those over
    capacity)."""
    layers = routed_layers(config)
    chosen = [seen.density[layer] for layer in layers]
    ran = [seen.executed[layer] for layer in layers]
    dropped = [max(0.0, 1 - r / c) if c > 0 else 0.0 for c, r in zip(chosen, ran, strict=True)]
    return {"routed_layers": layers, "density": chosen, "dropped": dropped}


def speed_numbers(
    config: RunConfig, seen: Averages, steps: int, seconds: float, devices: int
) -> dict[str, float]:
    """Throughput of ``steps`` steps in ``seconds``: tokens/s of the whole job, TFLOP/s a device as executed
    and dense-equivalent, and the MFU (executed, against ``logging.peak_tflops``) when a peak is stated."""
    tokens = steps * config.training.global_batch_size * config.data.sequence_length
    rate = tokens / seconds
    routed = set(routed_layers(config))
    densities = [seen.executed[layer] if layer in routed else 1.0 for layer in range(config.model.num_layers)]
    executed = rate * training_flops_per_token(config, densities) / TERA / devices
    numbers = {
        "tokens_per_second": rate,
        "executed_tflops": executed,
        "dense_tflops": rate * training_flops_per_token(config) / TERA / devices,
        "seconds_per_step": seconds / steps,
    }
    if config.logging.peak_tflops is not None:
        numbers["mfu"] = executed / config.logging.peak_tflops
    return numbers


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on the GPU, or resident on a CPU host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
