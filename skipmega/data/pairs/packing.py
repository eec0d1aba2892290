"""Which documents share a sample, so that as few as can be are cut: best-fit decreasing (Fewer Truncations
Improve Language Modeling, Ding et al. 2024, arXiv 2404.10830, section 3)."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Packing:
    """Pieces of documents, whole ones for the most part, and the sample that each goes into.

    Attributes:
        document: int64 [pieces], of which document.
        start: int64 [pieces], its first token in there.
        tokens: int64 [pieces], their number.
        sample: int64 [pieces].
        padding: int64 [samples], tokens that are missing in each.
        cut: documents in several pieces.
    """

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    tokens: NDArray[np.int64]
    sample: NDArray[np.int64]
    padding: NDArray[np.int64]
    cut: int


def pack(lengths: NDArray[np.integer], capacity: int) -> Packing:
    """Pack documents into samples.

    A document longer than a sample is cut into full samples and a rest; what is left is put, the longest
    first, where it leaves the least room. A rest of one token, the end, is left out: alone it would be an
    empty document. So each piece is a full sample or has its document's end.

    Args:
        lengths: [documents], tokens of each, its end included; of those of one length the first comes first.
        capacity: tokens of a sample.
    """
    whole, rest = np.divmod(lengths.astype(np.int64), capacity)
    pieces = whole + (rest > 1)
    document = np.repeat(np.arange(len(lengths)), pieces)
    start = capacity * (np.arange(len(document)) - np.repeat(pieces.cumsum() - pieces, pieces))
    tokens = np.minimum(capacity, lengths.astype(np.int64)[document] - start)
    longest_first = np.argsort(-tokens, kind="stable")
    sample = np.empty(len(tokens), np.int64)
    sample[longest_first] = _best_fit(tokens[longest_first].tolist(), capacity)
    filled = np.bincount(sample, weights=tokens).astype(np.int64)
    return Packing(document, start, tokens, sample, capacity - filled, cut=int((pieces > 1).sum()))


def _best_fit(sizes: Iterable[int], capacity: int) -> list[int]:
    """The sample that each piece goes into, pieces being given by size, the largest first."""
    with_room: list[list[int]] = [[] for _ in range(capacity)]  # samples by the room that is left in them
    rooms = 0  # bit r: some sample has room for r tokens
    samples, chosen = 0, []
    for size in sizes:
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            sample = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            sample, room = samples, capacity
            samples += 1
        chosen.append(sample)
        if left := room - size:
            rooms |= 1 << left
            with_room[left].append(sample)
    return chosen
