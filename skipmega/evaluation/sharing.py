"""Which texts are read together: those that begin alike, and as many of them as there is room for."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Tokens = tuple[int, ...]

# Less is not worth a pass of its own.
SHORTEST_PREFIX = 16
# Of so many tokens, more in one pass are no faster on a processor, and little on a GPU.
ENOUGH_TOKENS = 4096


@dataclass(frozen=True)
class Cluster:
    """``texts`` that begin with the same ``prefix`` and go on, each by one token or more."""

    prefix: Tokens
    texts: list[Tokens]


def cluster_texts(texts: Sequence[Tokens]) -> list[Cluster]:
    """Cut distinct texts into clusters; a prefix has at least SHORTEST_PREFIX tokens, or none.

    In sorted order neighbours begin alike: a cluster ends where the next text shares less than half of the
    prefix that its texts have so far.
    """
    clusters: list[Cluster] = []
    alone: list[Tokens] = []
    ordered = sorted(texts)
    begin = 0
    while begin < len(ordered):
        shared, end = ordered[begin][:-1], begin + 1
        while end < len(ordered):
            common = _common(shared, ordered[end][:-1])
            splits = end - begin > 1 and 2 * len(common) < len(shared)
            if splits or len(common) < SHORTEST_PREFIX:
                break
            shared, end = common, end + 1
        if end - begin > 1:
            clusters.append(Cluster(shared, ordered[begin:end]))
        else:
            alone.append(ordered[begin])
        begin = end
    return [*clusters, Cluster((), alone)] if alone else clusters


@dataclass(frozen=True)
class Room:
    """How many texts are read at once: ``texts`` of any length, and of short ones more, up to ``most``, as
    long as they remember no more than ``tokens`` together."""

    texts: int
    tokens: int
    most: int

    def batches(
        self, items: Iterable[T], length: Callable[[T], int], remembered: Callable[[T], int]
    ) -> list[list[T]]:
        """Cut ``items`` into batches, the longest first, beyond ``texts`` only if less than half is padding.

        Args:
            length: tokens of an item that are to be read.
            remembered: tokens that there is room for while it is being worked on.
        """
        batches: list[list[T]] = []
        widest = 0
        for item in sorted(items, key=length, reverse=True):
            here = batches[-1] if batches else []
            widest = max(widest, remembered(item))
            more = len(here) + 1
            alike = here and 2 * length(item) >= length(here[0])
            useful = alike and more * length(here[0]) <= ENOUGH_TOKENS
            fits = more <= self.most and more * widest <= self.tokens
            if (useful and fits) or 0 < len(here) < self.texts:
                here.append(item)
            else:
                batches.append([item])
                widest = remembered(item)
        return batches


def _common(one: Tokens, other: Tokens) -> Tokens:
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[: min(len(one), len(other)) if length is None else length]
