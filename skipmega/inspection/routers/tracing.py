"""Following the tokens of texts through a model: who executed which layer, and what was hard to predict."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from skipmega.errors import DataError
from skipmega.inspection.routers.subject import Subject
from skipmega.inspection.routers.texts import Texts


@dataclass(frozen=True)
class Traces:
    """What happened to each of n tokens, in the order of the texts.

    ``executed`` is bool [routed layers, n]; the others are [n]: ``ids``; ``loss``, of predicting the next
    token (a document's last one predicts its end), and ``surprise``, of having been predicted, float32 in
    nats; ``position`` in its sequence; ``document``, ``sequence`` and ``source``, counted from 0.
    """

    ids: NDArray[np.int64]
    executed: NDArray[np.bool_]
    loss: NDArray[np.float32]
    surprise: NDArray[np.float32]
    position: NDArray[np.int64]
    document: NDArray[np.int64]
    sequence: NDArray[np.int64]
    source: NDArray[np.int64]

    @property
    def depth(self) -> NDArray[np.int64]:
        """[n] number of routed layers that each token executed."""
        depth: NDArray[np.int64] = self.executed.sum(axis=0)
        return depth


@dataclass(frozen=True)
class _Sequence:
    """``tokens`` [s + 1] of a document that begins with its own end token: s are read, the last predicted."""

    tokens: NDArray[np.int64]
    document: int
    starts_document: bool


def trace_texts(subject: Subject, texts: Texts, batch_size: int, show_progress: bool = True) -> Traces:
    """Read texts as training does, in sequences of the model's length.

    A document follows the token that ends documents, which is read and not traced. What is beyond the model's
    length begins another sequence, which sees nothing of the one before.

    Args:
        subject: the model.
        texts: at least one token.
        batch_size: sequences in one call of the model.
        show_progress: draw a bar, with speed and time left.

    Raises:
        DataError: the model's losses are no numbers.
    """
    sequences = list(_cut(texts, subject.max_length, subject.vocabulary.eod_id))
    losses: list[NDArray[np.float32]] = []
    executed: list[NDArray[np.bool_]] = []
    total = sum(len(sequence.tokens) - 1 for sequence in sequences)
    with tqdm(total=total, desc="reading", unit=" tokens", disable=not show_progress) as bar:
        for begin in range(0, len(sequences), batch_size):
            batch = sequences[begin : begin + batch_size]
            traced = subject.trace(*_padded(batch, subject.vocabulary.eod_id))
            lost, ran = (result.cpu().numpy() for result in traced)
            for row, sequence in enumerate(batch):
                length = len(sequence.tokens) - 1
                losses.append(lost[row, :length])
                executed.append(ran[:, row, :length])
                bar.update(length)
    infinite = sum(int((~np.isfinite(loss)).sum()) for loss in losses)
    if infinite:
        raise DataError(f"{subject.name} loses no finite number of nats on {infinite} of {total} tokens")
    return _joined(texts, sequences, losses, executed)


def _cut(texts: Texts, max_length: int, eod_id: int) -> Iterator[_Sequence]:
    for number, document in enumerate(texts.documents):
        whole = np.concatenate([[eod_id], document, [eod_id]])
        for begin in range(0, len(document) + 1, max_length):
            yield _Sequence(whole[begin : begin + max_length + 1], number, begin == 0)


def _padded(batch: list[_Sequence], padding: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels, [b, s]; padding is on the right, where no token sees it."""
    longest = max(len(sequence.tokens) for sequence in batch)
    rows = np.full((len(batch), longest), padding, dtype=np.int64)
    for row, sequence in zip(rows, batch, strict=True):
        row[: len(sequence.tokens)] = sequence.tokens
    tokens = torch.from_numpy(rows)
    return tokens[:, :-1], tokens[:, 1:]


def _joined(
    texts: Texts,
    sequences: list[_Sequence],
    losses: list[NDArray[np.float32]],
    executed: list[NDArray[np.bool_]],
) -> Traces:
    lengths = [len(loss) for loss in losses]
    starts = np.array([sequence.starts_document for sequence in sequences])
    document = np.array([sequence.document for sequence in sequences])
    position = np.concatenate([np.arange(length) for length in lengths])
    loss = np.concatenate(losses)
    # a token's loss is the surprise of the one behind it; only the tokens that start documents have none
    traced = ~(np.repeat(starts, lengths) & (position == 0))
    return Traces(
        ids=np.concatenate(texts.documents),
        executed=np.concatenate(executed, axis=1)[:, traced],
        loss=loss[traced],
        surprise=np.roll(loss, 1)[traced],
        position=position[traced],
        document=np.repeat(document, lengths)[traced],
        sequence=np.repeat(np.arange(len(sequences)), lengths)[traced],
        source=np.repeat(np.array(texts.source_of)[document], lengths)[traced],
    )
