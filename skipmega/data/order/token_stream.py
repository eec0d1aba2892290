"""A source's samples, cut end to end out of its files and shuffled anew for every epoch, without an index."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipmega.data.pairs.token_reader import TokenReader
from skipmega.data.permutation import Permutation
from skipmega.errors import DataFaultError


@dataclass(frozen=True)
class TokenRange:
    """A run of tokens in ``<prefix>.bin``: ``tokens`` of type ``dtype`` from token ``first`` on. A ``packed``
    one is samples, each with the label after its last token, of which ``padding`` tokens fill up some."""

    prefix: str
    dtype: str
    first: int
    tokens: int
    packed: bool = False
    padding: float = 0

    def samples(self, length: int) -> int:
        """Whole samples of ``length`` tokens and the label after the last of them."""
        return self.tokens // (length + 1) if self.packed else max(0, self.tokens - 1) // length


class TokenStream:
    """The samples of one source, as many epochs of them as are asked for.

    An epoch has every sample of every range once, in an order of its own. The tokens at a range's end that
    fill no sample are left out, as many at its beginning instead in other epochs: where the first sample
    begins is drawn for each epoch. (Packed ranges are samples as they are.) Samples are a function of the
    arguments and the files' content alone.

    Args:
        name: of the source; part of what its order is drawn from, as files may be moved.
        ranges: of its files, in order.
        length: tokens of a sample.
        seed: of the orders.
        vocab_size: ids from there on are no tokens.
        retries: of a failed read.
    """

    def __init__(
        self, name: str, ranges: Sequence[TokenRange], length: int, seed: int, vocab_size: int, retries: int
    ) -> None:
        self.name, self.ranges, self.length = name, tuple(ranges), length
        self._seed, self._vocab_size = seed, vocab_size
        self._ends = list(accumulate(part.samples(length) for part in ranges))
        self._readers = [TokenReader(f"{part.prefix}.bin", retries) for part in ranges]

    @property
    def samples_per_epoch(self) -> int:
        """Samples that are read before one is read again."""
        return self._ends[-1] if self._ends else 0

    @property
    def tokens(self) -> int:
        """Tokens of all ranges."""
        return sum(part.tokens for part in self.ranges)

    @property
    def padding(self) -> float:
        """Share of the tokens that fill packed samples up."""
        return sum(part.padding for part in self.ranges) / max(self.tokens, 1)

    def read(self, index: int) -> NDArray[Any]:
        """Sample ``index``, int64 [length + 1].

        Raises:
            DataFaultError: it cannot be read, or holds what is no token.
        """
        number, first = self.place(index)
        part = self.ranges[number]
        itemsize = np.dtype(part.dtype).itemsize
        tokens = self._readers[number].read(part.dtype, self.length + 1, first * itemsize).astype(np.int64)
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise DataFaultError(
                f"{part.prefix}.bin holds what is no token between bytes {first * itemsize} and "
                f"{(first + self.length + 1) * itemsize}: ids {tokens.min()} to {tokens.max()}, the "
                f"tokenizer has {self._vocab_size}; the file is damaged (tools/data.py verify)"
            )
        return tokens

    def place(self, index: int) -> tuple[int, int]:
        """Where sample ``index`` is: the number of its range, and its first token in that range's file."""
        epoch, place = divmod(index, self.samples_per_epoch)
        sample = Permutation(self.samples_per_epoch, self._seed, self.name, epoch)[place]
        number = bisect_right(self._ends, sample)
        part = self.ranges[number]
        within = sample - self._ends[number] + part.samples(self.length)
        if part.packed:
            return number, part.first + within * (self.length + 1)
        left_over = part.tokens - 1 - part.samples(self.length) * self.length
        return number, part.first + self._shift(epoch, number, left_over) + within * self.length

    def _shift(self, epoch: int, number: int, most: int) -> int:
        key = f"shift/{self._seed}/{self.name}/{epoch}/{number}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % (most + 1)
