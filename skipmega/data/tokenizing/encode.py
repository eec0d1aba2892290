"""Many documents to token ids, on several processes, in the order they came."""

import functools
import hashlib
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipmega.data.corpora.readers import Document
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import DataError

_BATCH_CHARACTERS = 1 << 18
_BATCHES_PER_WORKER = 4


@dataclass(frozen=True)
class EncodedDocuments:
    """Token ids of consecutive documents.

    Attributes:
        documents: the ids of each, its end-of-document token included; one integer type throughout.
        held_out: whether each belongs to the held-out part.
        text_bytes: UTF-8 bytes of each.
        empty: documents left out because they hold nothing but white space.
    """

    documents: list[NDArray[Any]]
    held_out: list[bool]
    text_bytes: list[int]
    empty: int


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The smallest type of megatron-core's format that holds every id below ``vocab_size``."""
    return np.uint16 if vocab_size <= np.iinfo(np.uint16).max + 1 else np.int32


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out part, by its content alone.

    Equal documents land on the same side, wherever and however often they appear.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, *, workers: int, valid_fraction: float
) -> Iterator[EncodedDocuments]:
    """Encode documents in order; the result does not depend on ``workers``.

    Only a few batches per worker are read ahead of what has been taken. Workers are forked, so they share
    what this process has loaded.

    Args:
        workers: number of processes; 1 works in this one.
        valid_fraction: share of documents to mark as held out.

    Raises:
        DataError: the tokenizer's file has changed, or a worker died.
    """
    batches = _batched(documents)
    encode = functools.partial(_encode_batch, str(tokenizer.path), tokenizer.sha256, valid_fraction)
    if workers == 1:
        yield from map(encode, batches)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"))
    try:
        running: deque[Future[EncodedDocuments]] = deque()
        for batch in batches:
            running.append(pool.submit(encode, batch))
            if len(running) == workers * _BATCHES_PER_WORKER:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"one of {workers} tokenizing processes died, probably out of memory: use fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batched(documents: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def _load_once(path: str, sha256: str) -> Tokenizer:
    tokenizer = Tokenizer.load(Path(path))
    if tokenizer.sha256 != sha256:
        raise DataError(f"tokenizer {path} changed while documents were being encoded: start again")
    return tokenizer


def _encode_batch(path: str, sha256: str, valid_fraction: float, texts: list[str]) -> EncodedDocuments:
    tokenizer = _load_once(path, sha256)
    dtype = token_dtype(tokenizer.size)
    filled = [text for text in texts if text.strip()]
    return EncodedDocuments(
        documents=[np.array([*tokenizer.encode(text), tokenizer.eod_id], dtype=dtype) for text in filled],
        held_out=[is_held_out(text, valid_fraction) for text in filled],
        text_bytes=[len(text.encode()) for text in filled],
        empty=len(texts) - len(filled),
    )
