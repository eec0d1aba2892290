"""Samples of an order that a run passes over."""

from collections.abc import Sequence


class LeftOut:
    """Numbers of samples in the order, less those in ``ranges``.

    Args:
        ranges: first and last number of each; they may overlap.
    """

    def __init__(self, ranges: Sequence[Sequence[int]]) -> None:
        self.ranges: list[tuple[int, int]] = []
        for first, last in sorted((first, last) for first, last in ranges):
            if self.ranges and first <= self.ranges[-1][1] + 1:
                self.ranges[-1] = (self.ranges[-1][0], max(last, self.ranges[-1][1]))
            else:
                self.ranges.append((first, last))

    def number(self, index: int) -> int:
        """The number of the sample that is read as the ``index``-th, both from 0."""
        for first, last in self.ranges:
            if index < first:
                break
            index += last - first + 1
        return index

    def before(self, number: int) -> list[tuple[int, int]]:
        """The ranges cut off at ``number``, which is not among them."""
        return [(first, min(last, number - 1)) for first, last in self.ranges if first < number]
