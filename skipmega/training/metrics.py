"""From what the engine saw to the numbers of a log record."""

import resource
import sys
import time
from collections.abc import Callable

import torch

from skipmega.config import RunConfig
from skipmega.models.flops import training_flops_per_token
from skipmega.training.sums import Averages

TERA = 1e12
_HELD_OUT_TOLERANCE = 0.15
_DEAD = 0.02  # of the target, or of its distance from 1


class StepMeter:
    """How much of something that only grows (seconds; joules) was spent on training steps since the last
    reading; evaluation and saving are left out. ``source`` tells how much there is so far."""

    def __init__(self, source: Callable[[], float] = time.perf_counter) -> None:
        self._source = source
        self._spent = 0.0
        self._resumed = source()

    def pause(self) -> None:
        """Something other than training begins."""
        self._spent += self._source() - self._resumed

    def resume(self) -> None:
        """Training goes on."""
        self._resumed = self._source()

    def read(self) -> float:
        """What was spent so far; the count starts again at zero."""
        self.pause()
        spent, self._spent = self._spent, 0.0
        self.resume()
        return spent


def routing_numbers(config: RunConfig, seen: Averages) -> dict[str, list[float] | list[int]]:
    """Lists over the routed layers.

    ``density``: share of tokens chosen; ``dropped``: share of those over capacity; ``padded``: share of the
    computed rows that were padding (or masked); ``entropy`` of the decisions in nats; ``group_imbalance`` and
    ``rank_imbalance``: tokens of the fullest group, and of the fullest rank, over the mean; with balanced
    dispatch ``moved``: share of those that ran which another rank computed.
    """
    layers = config.routed_layers

    def of(values: list[float]) -> list[float]:
        return [values[layer] for layer in layers]

    def over(parts: list[float], wholes: list[float]) -> list[float]:
        return [part / whole if whole > 0 else 0.0 for part, whole in zip(parts, wholes, strict=True)]

    ran = of(seen.executed)
    moved = {"moved": over(of(seen.moved), ran)} if config.routing.dispatch == "balanced" else {}
    return {
        **moved,
        "routed_layers": layers,
        "density": of(seen.density),
        "dropped": [
            max(0.0, c - r) / c if c > 0 else 0.0 for r, c in zip(ran, of(seen.density), strict=True)
        ],
        "padded": [max(0.0, 1 - used) for used in over(ran, of(seen.computed))],
        "entropy": of(seen.entropy),
        "group_imbalance": over(of(seen.fullest_group), ran),
        "rank_imbalance": over(of(seen.fullest_rank), ran),
    }


class RoutingAlarms:
    """Tells, once each time it begins, that a routed layer runs for nobody or for everybody."""

    def __init__(self, config: RunConfig) -> None:
        self._targets = config.densities
        self._ringing: set[int] = set()

    def check(self, seen: Averages, warmed: float) -> list[str]:
        """Messages for layers that have just left the range their target allows; none while the density warms
        up (``warmed`` < 1), when everybody runs by design."""
        messages: list[str] = []
        if warmed < 1:
            return messages
        for layer, target in self._targets.items():
            share = seen.density[layer]
            state = {share < target * _DEAD: "dead", share > 1 - (1 - target) * _DEAD: "always on"}.get(True)
            if state is None or target in (0.0, 1.0):
                self._ringing.discard(layer)
            elif layer not in self._ringing:
                self._ringing.add(layer)
                messages.append(
                    f"layer {layer} is {state}: {share:.1%} of the tokens chose it, routing.density is "
                    f"{target:.1%}; its router no longer decides anything"
                )
        return messages


class HeldOutAlarms:
    """Tells, once, that evaluation executes another share than it should."""

    def __init__(self, config: RunConfig) -> None:
        self._targets = config.eval_densities or config.densities
        self._told = False

    def check(self, seen: Averages) -> list[str]:
        """A message about the layer that is furthest off, at the first evaluation where one is."""
        errors = {layer: abs(seen.density[layer] - target) for layer, target in self._targets.items()}
        worst = max(errors, key=lambda layer: errors[layer], default=None)
        if worst is None or self._told or errors[worst] <= _HELD_OUT_TOLERANCE:
            return []
        self._told = True
        return [
            f"layer {worst} executes {seen.density[worst]:.1%} of the held-out tokens, its target is "
            f"{self._targets[worst]:.1%}: the held-out loss is that of another density than was trained; "
            "routing.eval_density moves the thresholds of evaluation to a density"
        ]


def padding_share(config: RunConfig, seen: Averages, steps: int) -> float:
    """Share of the tokens of ``steps`` steps whose label fills a packed sample up. They run like any other:
    densities, capacity, tokens/s and FLOPs count them, the loss does not."""
    tokens = steps * config.training.global_batch_size * config.data.sequence_length
    return max(0.0, 1 - seen.learnt / tokens)


def speed_numbers(
    config: RunConfig, seen: Averages, steps: int, seconds: float, devices: int, joules: float | None = None
) -> dict[str, float]:
    """Throughput of ``steps`` steps in ``seconds``: tokens/s of the whole job, TFLOP/s a device as executed
    and dense-equivalent, the MFU (executed, against ``logging.peak_tflops``) when a peak is stated, and the
    joules a token when the devices told that they consumed ``joules``."""
    tokens = steps * config.training.global_batch_size * config.data.sequence_length
    rate = tokens / seconds
    executed = rate * training_flops_per_token(config, executed_shares(config, seen)) / TERA / devices
    numbers = {
        "tokens_per_second": rate,
        "executed_tflops": executed,
        "dense_tflops": rate * training_flops_per_token(config) / TERA / devices,
        "seconds_per_step": seconds / steps,
    }
    if config.logging.peak_tflops is not None:
        numbers["mfu"] = executed / config.logging.peak_tflops
    if joules is not None:
        numbers["joules_per_token"] = joules / tokens
    return numbers


def executed_shares(config: RunConfig, seen: Averages) -> dict[int, float]:
    """Share of tokens computed by each routed layer; all of them where everything is computed."""
    everybody = config.routing.computes_all
    return {layer: 1.0 if everybody else seen.executed[layer] for layer in config.routed_layers}


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on the GPU, or resident on a CPU host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
