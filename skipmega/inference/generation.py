"""Going on with a text, token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipmega.errors import ConfigError
from skipmega.inference.native import NativeModel


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest at ``temperature`` 0, else drawn from the softmax of the logits
    over the temperature, among the ``top_k`` likeliest if given. Draws follow from ``seed``.

    Raises:
        ConfigError: a value has no meaning.
    """

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature} is negative: give 0 for the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} leaves no token to choose: give 1 or more")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token by its logits [vocabulary]; ``generator`` is a CPU's, the same on all processes."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = logits.double().cpu() / self.temperature
        if self.top_k is not None and self.top_k < len(scaled):
            scaled[scaled < scaled.topk(self.top_k).values[-1]] = -torch.inf
        return int(torch.multinomial(scaled.softmax(dim=0), 1, generator=generator))


def generate(
    model: NativeModel, prompt: Sequence[int], max_tokens: int, end: int, size: int, sampling: Sampling
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, up to an end token, which is left out.

    All processes of a model go on together and yield the same. What was read before is not read again where
    :attr:`NativeModel.reads_on`.

    Args:
        prompt: ids, at least one.
        max_tokens: how many follow at most.
        end: id that ends a text.
        size: ids below it are chosen from; a model's vocabulary is padded beyond its tokenizer's.

    Raises:
        ConfigError: there is no prompt, or with what follows it is longer than the model.
    """
    if not prompt or max_tokens < 1:
        raise ConfigError(
            f"max_tokens={max_tokens} after a prompt of {len(prompt)}: give one or more of both"
        )
    if len(prompt) + max_tokens > model.max_length:
        raise ConfigError(
            f"max_tokens={max_tokens} after a prompt of {len(prompt)} are longer than the model's "
            f"{model.max_length} tokens: shorten the prompt or ask for fewer"
        )
    return _go_on(model, list(prompt), max_tokens, end, size, sampling)


def _go_on(
    model: NativeModel, text: list[int], max_tokens: int, end: int, size: int, sampling: Sampling
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    cache, unread = model.new_cache(1) if model.reads_on else None, text
    for _ in range(max_tokens):
        if cache is None:
            logits = model.logits(torch.tensor([text]), torch.tensor([[len(text) - 1]]))
        else:
            logits = model.read(cache, torch.tensor([unread]), [len(unread)])
        token = sampling.choose(logits[0, -1, :size], generator)
        if token == end:
            return
        yield token
        text, unread = [*text, token], [token]
