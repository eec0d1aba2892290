"""Which source gives which sample of a run: a pure function of seed, shares and the sample's number.

Nothing is built and nothing remembered: the number of samples that a source has given before any other is
counted in closed form. So a run may be resumed anywhere, on any number of ranks, or made longer, and reads
the samples that it would have read.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

_CIRCLE = 1 << 64
_TURN = 0x9E3779B97F4A7C15  # the golden ratio's share of the circle: no rotation covers it more evenly
_PLACES = 32  # binary places of a share


@dataclass(frozen=True)
class Stage:
    """A part of a run with shares of its own.

    Attributes:
        first_sample: where it begins; it ends where the next begins.
        weights: of all sources, at least 0, some of them greater; shares are in proportion.
    """

    first_sample: int
    weights: tuple[float, ...]


class Mixture:
    """Sources dealt out in proportion to their weights, as evenly as can be.

    Sample ``n`` of a stage lies at the angle ``n`` golden turns (plus a start drawn of the seed) and belongs
    to the source in whose arc that is. After any number of samples a source is within a few samples of its
    share, there are no blocks, and the count of a source's samples below ``n`` is a sum of floors, which
    Euclid's algorithm gives.

    Args:
        stages: ascending, the first from sample 0.
        seed: other seeds begin elsewhere on the circle.
    """

    def __init__(self, stages: Sequence[Stage], seed: int) -> None:
        assert stages[0].first_sample == 0
        self._starts = [stage.first_sample for stage in stages]
        self._arcs = [_arcs(stage.weights) for stage in stages]
        self._offsets = [_offset(seed, number) for number in range(len(stages))]
        self._given = [(0,) * len(stages[0].weights)]
        for number in range(len(stages) - 1):
            self._given.append(self.drawn(self._starts[number + 1]))

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of sample ``sample`` and which of that source's samples it is, both from 0."""
        stage = bisect_right(self._starts, sample) - 1
        within, arcs, offset = sample - self._starts[stage], self._arcs[stage], self._offsets[stage]
        source = bisect_right(arcs, (within * _TURN + offset) % _CIRCLE) - 1
        before = _count_in_arc(within, offset, arcs[source], arcs[source + 1])
        return source, self._given[stage][source] + before

    def drawn(self, samples: int) -> tuple[int, ...]:
        """How many of the first ``samples`` samples each source gives."""
        stage = max(0, bisect_right(self._starts, samples - 1) - 1)
        within, arcs, offset = samples - self._starts[stage], self._arcs[stage], self._offsets[stage]
        return tuple(
            given + _count_in_arc(within, offset, first, end)
            for given, first, end in zip(self._given[stage], arcs, arcs[1:], strict=False)
        )


def _arcs(weights: Sequence[float]) -> list[int]:
    """Where each source's arc begins, and the end of the circle.

    Edges are rounded to 2^-32 of it, so that the last bit of somebody's ``pow`` changes no stream.
    """
    total = sum(weights)
    shares = [0.0, *(edge / total for edge in accumulate(weights))]
    return [round(share * (1 << _PLACES)) << (64 - _PLACES) for share in shares]


def _offset(seed: int, stage: int) -> int:
    digest = hashlib.blake2b(f"mixture/{seed}/{stage}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _count_in_arc(samples: int, offset: int, first: int, end: int) -> int:
    """How many of the angles ``n * _TURN + offset``, n below ``samples``, lie from ``first`` to ``end``."""
    return _floor_sum(samples, offset + _CIRCLE - first) - _floor_sum(samples, offset + _CIRCLE - end)


def _floor_sum(count: int, start: int) -> int:
    """The sum of ``(n * _TURN + start) // _CIRCLE`` over n below ``count``."""
    total, step, modulus = 0, _TURN, _CIRCLE
    while count > 0:
        total += count * (count - 1) // 2 * (step // modulus) + count * (start // modulus)
        step, start = step % modulus, start % modulus
        last = count * step + start
        count, start, step, modulus = last // modulus, last % modulus, modulus, step
        if step == 0 or modulus == 0:
            break
    return total
