"""What answering took: seconds, tokens, joules, and how the time of an input depends on its depth.

An input is a distinct text: a question with all its choices, a prompt to continue, a window of a rolling
text. What its batch took is what it waited, so with ``batch_size=1`` latencies and depths are those of single
inputs.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from skipmega.inference.work import Work

QUANTILES = (50, 90, 99)
MILLI = 1e-3
_BINS = 4
_FEWEST_RANKED = 8  # batches; of two, any correlation is 1 or -1

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Batch:
    """What one batch of inputs took; ``depth`` is the mean number of layers that its tokens executed."""

    inputs: int
    tokens: int
    seconds: float
    depth: float | None


@dataclass(frozen=True)
class Latency:
    """Milliseconds that inputs waited: the median and the slow ends."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class DepthClass:
    """A quarter of the batches, by depth; ``milliseconds_per_token`` is the median."""

    depth: float
    inputs: int
    latency: Latency
    milliseconds_per_token: float


@dataclass(frozen=True)
class Effort:
    """What one ``kind`` of requests took: "score", "rolling" or "generate".

    ``tokens`` are those that the model read, shared beginnings once and generated ones included, ``seconds``
    the time of the slowest replica. ``joules_per_token`` is None where a device does not tell. ``depth`` is
    the mean number of layers executed per token, None for models that do not tell; ``depth_correlation`` is
    the rank correlation of batches' depth with their time, ``depth_correlation_per_token`` with that per
    token, None if one of the two is the same everywhere or there are fewer than 8 batches; ``by_depth`` has a
    quarter of the batches each, the shallowest first.
    """

    kind: str
    inputs: int
    tokens: int
    seconds: float
    joules_per_token: float | None
    latency: Latency
    depth: float | None
    depth_correlation: float | None
    depth_correlation_per_token: float | None
    by_depth: list[DepthClass] = field(default_factory=list)

    def numbers(self) -> dict[str, float]:
        """For a log record: those that are known, ``KIND/tokens_per_second``, ``KIND/ms_p50`` and so on."""
        each = {
            "tokens_per_second": self.tokens / self.seconds,
            "joules_per_token": self.joules_per_token,
            "layers_per_token": self.depth,
            "depth_correlation": self.depth_correlation_per_token,
            **{f"ms_p{name}": getattr(self.latency, f"p{name}") for name in QUANTILES},
        }
        return {f"{self.kind}/{name}": value for name, value in each.items() if value is not None}

    def describe(self) -> list[str]:
        """Lines for a report."""
        joules = "not available" if self.joules_per_token is None else f"{self.joules_per_token:.4g}"
        lines = [
            f"{self.kind}: {self.inputs} inputs, {self.tokens:,} tokens in {self.seconds:.1f} s "
            f"({self.tokens / self.seconds:,.0f} tokens/s); joules per token {joules}",
            f"  ms per input: {_spread(self.latency)}",
        ]
        if self.depth is not None:
            lines.append(
                f"  layers per token: {self.depth:.2f}; rank correlation of depth with ms "
                f"{_signed(self.depth_correlation)}, with ms per token "
                f"{_signed(self.depth_correlation_per_token)}"
            )
        for part in self.by_depth:
            lines.append(
                f"    {part.depth:.2f} layers, {part.inputs} inputs: ms {_spread(part.latency)}; "
                f"{part.milliseconds_per_token:.4g} ms per token"
            )
        return lines


class EffortMeter:
    """Measures the batches of one kind of requests.

    Args:
        kind: of the requests.
        joules: what this process's device has consumed so far; None where it does not tell.
        clock: seconds.
    """

    def __init__(
        self,
        kind: str,
        joules: Callable[[], float] | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.kind = kind
        self.batches: list[Batch] = []
        self.joules: float | None = None if joules is None else 0.0
        self._read_joules, self._clock = joules, clock
        self._began, self._joules_began = 0.0, 0.0

    def begin(self) -> None:
        """A batch begins."""
        self._began = self._clock()
        if self._read_joules is not None:
            self._joules_began = self._read_joules()

    def end(self, inputs: int, work: Work) -> None:
        """It has ended: its answers are known on the host."""
        seconds = self._clock() - self._began
        if self._read_joules is not None and self.joules is not None:
            self.joules += self._read_joules() - self._joules_began
        depth = sum(work.executed) / work.tokens if work.executed and work.tokens else None
        self.batches.append(Batch(inputs, work.tokens, seconds, depth))


def summarize(kind: str, replicas: Sequence[Sequence[Batch]], joules: float | None) -> Effort | None:
    """What ``kind`` of requests took: the batches of each replica, and the joules of all devices (None: not
    known). None if there were no batches."""
    batches = [batch for each in replicas for batch in each]
    if not batches:
        return None
    tokens = sum(batch.tokens for batch in batches)
    tell = [batch.depth for batch in batches if batch.depth is not None]
    deep = len(tell) == len(batches)
    depths = np.array(tell if deep else [], dtype=np.float64)
    spent = np.array([batch.seconds / MILLI for batch in batches])
    per_token = spent / np.array([max(batch.tokens, 1) for batch in batches])
    return Effort(
        kind=kind,
        inputs=sum(batch.inputs for batch in batches),
        tokens=tokens,
        seconds=max(sum(batch.seconds for batch in each) for each in replicas),
        joules_per_token=None if joules is None or not tokens else joules / tokens,
        latency=_latency(batches),
        depth=float(depths @ [batch.tokens for batch in batches]) / tokens if deep and tokens else None,
        depth_correlation=_rank_correlation(depths, spent),
        depth_correlation_per_token=_rank_correlation(depths, per_token),
        by_depth=_by_depth(batches, depths, per_token),
    )


def _by_depth(batches: Sequence[Batch], depths: Floats, per_token: Floats) -> list[DepthClass]:
    if len(set(depths.tolist())) < _BINS:
        return []
    parts = []
    for places in np.array_split(np.argsort(depths, kind="stable"), _BINS):
        inside = [batches[place] for place in places]
        parts.append(
            DepthClass(
                depth=float(depths[places].mean()),
                inputs=sum(batch.inputs for batch in inside),
                latency=_latency(inside),
                milliseconds_per_token=float(np.median(per_token[places])),
            )
        )
    return parts


def _latency(batches: Sequence[Batch]) -> Latency:
    waited = np.repeat(
        [batch.seconds / MILLI for batch in batches], [max(batch.inputs, 1) for batch in batches]
    )
    return Latency(*(float(value) for value in np.percentile(waited, QUANTILES)))


def _rank_correlation(one: Floats, other: Floats) -> float | None:
    if len(one) < _FEWEST_RANKED or min(len(set(one.tolist())), len(set(other.tolist()))) < 2:
        return None
    from scipy.stats import spearmanr

    found = float(spearmanr(one, other).statistic)
    return found if math.isfinite(found) else None


def _spread(latency: Latency) -> str:
    return f"p50 {latency.p50:.4g}, p90 {latency.p90:.4g}, p99 {latency.p99:.4g}"


def _signed(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.2f}"
