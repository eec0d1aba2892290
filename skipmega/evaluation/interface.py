"""What evaluation asks of a model and of a tokenizer; nothing here knows how either is built."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from skipmega.inference.work import Work


class Cache(Protocol):
    """What a model remembers of a batch of texts."""

    def take(self, rows: Sequence[int]) -> "Cache":
        """A copy of these rows, any number of times each."""


class LanguageModel(Protocol):
    """A causal language model on any number of processes.

    When a copy of the model spans several processes, all of them call :meth:`logits` and :meth:`read` in the
    same order with the same tokens, and each gets the whole result. Several copies share the work.
    """

    @property
    def max_length(self) -> int:
        """The longest input, in tokens."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits: the padded vocabulary."""

    @property
    def device(self) -> torch.device:
        """Where logits are left."""

    @property
    def reads_on(self) -> bool:
        """Whether :meth:`new_cache` and :meth:`read` may be called; if not, texts are read whole."""

    @property
    def replica(self) -> int:
        """Number of this process's replica among the :attr:`replicas`, which share work."""

    @property
    def replicas(self) -> int:
        """How many copies of the model there are."""

    def exchange(self, found: Any) -> list[Any]:
        """What each replica found, in their order, on every process."""

    def logits(self, tokens: Tensor, at: Tensor) -> Tensor:
        """Next-token logits at some positions.

        Position ``t`` depends on ``tokens[:, : t + 1]`` alone, so padding on the right changes nothing
        to its left.

        Args:
            tokens: [batch, sequence] int64, at most :attr:`max_length` long.
            at: [batch, m] int64, the positions.

        Returns:
            [batch, m, vocab_size] float32 on :attr:`device`.
        """

    def take_work(self) -> Work:
        """What was read since the last call; the processes of this copy call it together."""

    def new_cache(self, batch: int) -> Cache:
        """What :meth:`read` remembers of ``batch`` texts that are still empty."""

    def read(self, cache: Any, tokens: Tensor, counts: Sequence[int], at: Tensor) -> Tensor:
        """Append ``tokens`` [batch, n] int64, of which each row's first ``counts`` are no padding, to the
        texts of ``cache``; logits at ``at`` [batch, m] of them, as :meth:`logits`."""


class TextTokenizer(Protocol):
    """Text to ids and back, without special tokens."""

    @property
    def eod_id(self) -> int:
        """The id that ends a document."""

    @property
    def begin_id(self) -> int:
        """The id that a text without a context is conditioned on."""

    @property
    def size(self) -> int:
        """Number of ids; the model's vocabulary may be padded beyond it."""

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; no special tokens are added."""

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``, all below :attr:`size`."""
