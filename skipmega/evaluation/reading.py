"""Reading texts with a model: what they share once, and what follows them after they are read."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from skipmega.evaluation.interface import Cache, LanguageModel
from skipmega.evaluation.sharing import Tokens


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
        batch_size: rows in one call of the model.
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
        scores = [(0.0, True)] * len(owners)
        if self._cache is not None:
            scores = [
                _score_span(self.last_logits[owner], rest[:1])
                for owner, rest in zip(owners, continuations, strict=True)
            ]
        known = 0 if self._cache is None else 1
        asked: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for place, rest in enumerate(continuations):
            if len(rest) > known:
                asked.setdefault((owners[place], tuple(rest[:-1])), []).append(place)
        read = sorted(asked, key=lambda row: -len(row[1]))
        for begin in range(0, len(read), self._batch_size):
            batch = read[begin : begin + self._batch_size]
            for row, logits in zip(batch, self._read_after(batch), strict=True):
                for place in asked[row]:
                    rest = continuations[place][known:]
                    log_likelihood, greedy = _score_span(logits[: len(rest)], rest)
                    before, greedy_before = scores[place]
                    scores[place] = (before + log_likelihood, greedy_before and greedy)
        return scores

    def _read_after(self, batch: Sequence[tuple[int, tuple[int, ...]]]) -> Tensor:
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


def _score_span(logits_sv: Tensor, tokens: list[int]) -> tuple[float, bool]:
    """Log-likelihood (nats) of ``tokens`` under logits [vocab] or [their number, vocab], and greediness."""
    targets_s = torch.tensor(tokens, dtype=torch.int64, device=logits_sv.device)
    log_probs_sv = torch.log_softmax(logits_sv.view(len(tokens), -1), dim=-1)
    chosen_s = log_probs_sv.gather(1, targets_s.unsqueeze(1))
    return float(chosen_s.sum()), bool((log_probs_sv.argmax(dim=-1) == targets_s).all())
