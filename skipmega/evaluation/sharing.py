"""Which texts begin alike, so that their beginning is read once."""

from collections.abc import Sequence
from dataclasses import dataclass

Tokens = tuple[int, ...]

# Less is not worth a pass of its own.
SHORTEST_PREFIX = 16


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


def _common(one: Tokens, other: Tokens) -> Tokens:
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[: min(len(one), len(other)) if length is None else length]
