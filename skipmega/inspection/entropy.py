"""The loss of a model that knows only how frequent each token is: the line every model must cross."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipmega.errors import DataError

Counts = NDArray[np.int64]

CHUNK_TOKENS = 1 << 22


def unigram_entropy(train_counts: Counts, held_out_counts: Counts) -> float:
    """Cross-entropy of held-out tokens under the unigram distribution of the training tokens.

    With training counts ``c`` over a vocabulary of ``V`` ids, every id has the add-one smoothed
    probability ``p(v) = (c[v] + 1) / (sum(c) + V)``; the result is the mean of ``-log p(v)`` over the
    held-out tokens.

    Args:
        train_counts: [vocab] occurrences of each id in the training tokens.
        held_out_counts: [vocab] occurrences in the held-out tokens, at least one.

    Returns:
        nats per token, comparable with a model's loss over the same vocabulary.

    Raises:
        DataError: the vocabularies differ, or there is no held-out token.
    """
    if train_counts.shape != held_out_counts.shape:
        raise DataError(
            f"the training counts are of {train_counts.size} ids, the held-out counts of "
            f"{held_out_counts.size}: count both with the same vocabulary"
        )
    total = int(held_out_counts.sum())
    if total == 0:
        raise DataError("there are no held-out tokens to take the unigram entropy of")
    smoothed = train_counts + 1.0
    log_probabilities = np.log(smoothed) - np.log(smoothed.sum())
    return float(-(held_out_counts @ log_probabilities) / total)


def count_tokens(arrays: Iterable[NDArray[Any]], vocab_size: int) -> Counts:
    """Occurrences of each id, int64 [vocab_size], in integer arrays of any shape.

    Raises:
        DataError: an id outside the vocabulary.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for array in arrays:
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < vocab_size:
            raise DataError(
                f"token ids from {array.min()} to {array.max()} do not fit a vocabulary of {vocab_size}: "
                "was the data tokenized with another tokenizer?"
            )
        counts += np.bincount(array.ravel(), minlength=vocab_size)
    return counts


def count_dataset(prefix: str | Path, vocab_size: int, documents: range | None = None) -> Counts:
    """Occurrences of each id, int64 [vocab_size], in a Megatron .bin/.idx pair, read in chunks.

    Args:
        prefix: path of the pair without the ending.
        vocab_size: ids are below it.
        documents: which documents, a range of step 1; None for all.

    Raises:
        DataError: the pair does not exist, lacks some of the documents, or has ids outside the
            vocabulary.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    if not IndexedDataset.exists(str(prefix)):
        raise DataError(f"there is no tokenized data set {prefix}.bin with its {prefix}.idx")
    dataset = IndexedDataset(str(prefix))
    bounds = dataset.document_indices
    available = len(bounds) - 1
    chosen = range(available) if documents is None else documents
    if chosen.step != 1 or chosen.start < 0 or chosen.stop > available:
        raise DataError(f"{prefix} has documents 0 to {available - 1}, {chosen} was asked for")
    if not chosen:
        return np.zeros(vocab_size, dtype=np.int64)
    return count_tokens(_chunks(dataset, bounds[chosen.start], bounds[chosen.stop]), vocab_size)


def _chunks(dataset: Any, first: int, last: int) -> Iterator[NDArray[Any]]:
    """The tokens of sequences ``first`` to ``last`` (exclusive), which lie one after the other in the
    .bin file, in arrays of at most CHUNK_TOKENS."""
    dtype = dataset.index.dtype
    start = int(dataset.index.sequence_pointers[first])
    total = int(dataset.sequence_lengths[first:last].sum(dtype=np.int64))
    for done in range(0, total, CHUNK_TOKENS):
        count = min(CHUNK_TOKENS, total - done)
        yield dataset.bin_reader.read(
            dtype=dtype, count=count, offset=start + done * np.dtype(dtype).itemsize
        )
