"""Reading texts with a model: what they share once, and what follows them after they are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from skipmega.evaluation.interface import Cache, LanguageModel
from skipmega.evaluation.sharing import Room, Tokens

# What is read after a text: its number, and the tokens
_Row = tuple[int, Tokens]


@dataclass
class _Span:
    """A continuation that is being scored."""

    log_likelihood: float = 0.0
    is_greedy: bool = True


class Prefix:
    """The beginning of some texts, read when it is first wanted."""

    def __init__(self, model: LanguageModel, tokens: Tokens) -> None:
        self._model = model
        self.tokens = tokens
        self._cache: Cache | None = None

    def cache(self, batch: int) -> Cache:
        """A cache of ``batch`` texts that begin so."""
        if not self.tokens:
            return self._model.new_cache(batch)
        if self._cache is None:
            self._cache = self._model.new_cache(1)
            last = torch.tensor([[len(self.tokens) - 1]])
            self._model.read(self._cache, torch.tensor([self.tokens]), [len(self.tokens)], last)
        return self._cache.take([0] * batch)


class TextReader:
    """Texts that a model has read, to be continued.

    Args:
        model: reads them.
        prefix: how all of them begin.
        texts: whole, prefix included.
        batch_size: texts in one call of the model.
        padding: an id of the vocabulary.
    """

    def __init__(
        self,
        model: LanguageModel,
        prefix: Prefix,
        texts: Sequence[Tokens],
        batch_size: int,
        padding: int,
    ) -> None:
        self._model, self._batch_size, self._padding = model, batch_size, padding
        self._texts = [list(text) for text in texts]
        self._unread = [text[len(prefix.tokens) :] for text in self._texts]
        self._cache = prefix.cache(len(texts)) if model.reads_on else None

    @cached_property
    def last_logits(self) -> Tensor:
        """[texts, vocabulary] float32: of what follows each text as it was given."""
        rows = self._texts if self._cache is None else self._unread
        return self._read(rows, [[len(row) - 1] for row in rows])[:, 0]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these of the texts, any number of times each."""
        if list(rows) == list(range(len(self._texts))):
            return
        self._texts = [list(self._texts[row]) for row in rows]
        if self._cache is not None:
            self._cache = self._cache.take(rows)

    def append(self, tokens: Sequence[int]) -> Tensor:
        """Add one token to each text; logits [texts, vocabulary] of what follows."""
        for text, token in zip(self._texts, tokens, strict=True):
            text.append(token)
        rows = [[token] for token in tokens] if self._cache is not None else self._texts
        return self._read(rows, [[len(row) - 1] for row in rows])[:, 0]

    def score(self, owners: Sequence[int], continuations: Sequence[list[int]]) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation after the text of its owner, and whether greedy decoding
        gives it."""
        spans = [_Span() for _ in owners]
        known = 0 if self._cache is None else 1
        if known:
            first = [
                (place, owner, rest[0])
                for place, (owner, rest) in enumerate(zip(owners, continuations, strict=True))
            ]
            _score_tokens(spans, first, self.last_logits)
        asked: dict[_Row, list[int]] = {}
        for place, rest in enumerate(continuations):
            if len(rest) > known:
                asked.setdefault((owners[place], tuple(rest[:-1])), []).append(place)
        tokens_at_once = 0 if self._cache is None else self._batch_size * self._model.max_length
        room = Room(self._batch_size, tokens_at_once, most=len(asked))
        for batch in room.batches(
            asked, lambda row: len(row[1]), lambda row: len(self._texts[row[0]]) + len(row[1])
        ):
            logits = self._read_after(batch)
            width = logits.shape[1]
            tokens = [
                (place, number * width + at, token)
                for number, row in enumerate(batch)
                for place in asked[row]
                for at, token in enumerate(continuations[place][known:])
            ]
            _score_tokens(spans, tokens, logits.flatten(0, 1))
        return [(span.log_likelihood, span.is_greedy) for span in spans]

    def _read_after(self, batch: Sequence[_Row]) -> Tensor:
        """Logits [batch, longest, vocabulary] after each token that follows the text of its owner; where
        texts are not remembered, after the text's last token too."""
        if self._cache is None:
            texts = [self._texts[owner] for owner, _ in batch]
            rows = [[*text, *rest] for text, (_, rest) in zip(texts, batch, strict=True)]
            places = [range(len(text) - 1, len(row)) for text, row in zip(texts, rows, strict=True)]
            return self._read(rows, [list(place) for place in places])
        kept, self._cache = self._cache, self._cache.take([owner for owner, _ in batch])
        rows = [list(rest) for _, rest in batch]
        logits = self._read(rows, [list(range(len(row))) for row in rows])
        self._cache = kept
        return logits

    def _read(self, rows: Sequence[list[int]], at: Sequence[list[int]]) -> Tensor:
        """Logits [rows, longest of at, vocabulary] at places of ``rows``, which the texts go on with if they
        are remembered."""
        tokens, places = _padded(rows, self._padding), _padded(at, 0)
        with torch.no_grad():
            if self._cache is None:
                return self._model.logits(tokens, places)
            return self._model.read(self._cache, tokens, [len(row) for row in rows], places)


def _padded(rows: Sequence[list[int]], padding: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], dtype=torch.int64)


def _score_tokens(
    spans: Sequence["_Span"], tokens: Sequence[tuple[int, int, int]], logits_rv: Tensor
) -> None:
    """Add ``tokens``, each (its span, the row of the logits [rows, vocabulary] that predicts it, its id)."""
    rows = sorted({row for _, row, _ in tokens})
    row_of = {row: number for number, row in enumerate(rows)}
    log_probs_rv = torch.log_softmax(logits_rv[rows], dim=-1)
    likeliest_r = log_probs_rv.argmax(dim=-1).tolist()
    at = torch.tensor([[row_of[row], token] for _, row, token in tokens], device=logits_rv.device)
    chosen = log_probs_rv[at[:, 0], at[:, 1]].tolist()
    for (place, row, token), log_probability in zip(tokens, chosen, strict=True):
        spans[place].log_likelihood += log_probability
        spans[place].is_greedy &= likeliest_r[row_of[row]] == token
