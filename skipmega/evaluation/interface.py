"""What evaluation asks of a model and of a tokenizer; nothing here knows how either is built."""

from typing import Protocol

import torch
from torch import Tensor


class LanguageModel(Protocol):
    """A causal language model on any number of processes.

    When a model spans several processes, all of them call :meth:`logits` in the same order with the same
    tokens, and each gets the whole result.
    """

    @property
    def max_length(self) -> int:
        """The longest input, in tokens."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits: the padded vocabulary."""

    @property
    def device(self) -> torch.device:
        """Where :meth:`logits` wants its tokens and leaves its result."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits at every position.

        Position ``t`` depends on ``tokens[:, : t + 1]`` alone, so padding on the right changes nothing
        to its left.

        Args:
            tokens: [batch, sequence] int64 on :attr:`device`, at most :attr:`max_length` long.

        Returns:
            [batch, sequence, vocab_size] float32.
        """


class TextTokenizer(Protocol):
    """Text to ids and back, without special tokens."""

    @property
    def eod_id(self) -> int:
        """The id that ends a document; also what a text without a context is conditioned on."""

    @property
    def size(self) -> int:
        """Number of ids; the model's vocabulary may be padded beyond it."""

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; no special tokens are added."""

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``, all below :attr:`size`."""
