"""Keys that equal documents share: one for all of their text, and one for each band of its MinHashes."""

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from skipmega.data.cleaning.config import DeduplicateConfig
from skipmega.data.cleaning.words import hash_runs, hash_words, mix, normalized
from skipmega.errors import DataError

# a key's last bit says of which kind it is
NEAR, EXACT = 0, 1
ROW = np.dtype([("key", "<u8"), ("document", "<u4")])
_SHINGLES_AT_ONCE = 1 << 12
_DOCUMENTS_AT_ONCE = 1 << 15


class KeyMaker:
    """Makes the keys of a document.

    Documents that agree in one are taken for duplicates; that two others agree by chance is expected once
    in 2^63 pairs of keys.
    """

    def __init__(self, config: DeduplicateConfig) -> None:
        self._config = config
        numbers = np.arange(config.bands * config.rows, dtype=np.uint64)
        self._factors = mix(numbers) | np.uint64(1)
        self._terms = mix(~numbers)

    def keys(self, text: str) -> NDArray[np.uint64]:
        """At most 1 + bands keys, uint64, no two of them equal."""
        plain = normalized(text)
        keys = []
        if self._config.exact:
            digest = hashlib.blake2b(plain.encode(), digest_size=8).digest()
            keys.append(np.frombuffer(digest, "<u8") | np.uint64(EXACT))
        if self._config.near:
            shingles = np.unique(hash_runs(hash_words(plain), self._config.shingle))
            if len(shingles):
                keys.append(self._bands(shingles))
        return np.unique(np.concatenate(keys)) if keys else np.empty(0, np.uint64)

    def _bands(self, shingles: NDArray[np.uint64]) -> NDArray[np.uint64]:
        lowest = np.full(len(self._factors), np.iinfo(np.uint64).max, np.uint64)
        for start in range(0, len(shingles), _SHINGLES_AT_ONCE):
            part = shingles[start : start + _SHINGLES_AT_ONCE]
            for number, (factor, term) in enumerate(zip(self._factors, self._terms, strict=True)):
                lowest[number] = min(lowest[number], (part * factor + term).min())
        keys = np.arange(self._config.bands, dtype=np.uint64)
        for row in lowest.reshape(self._config.bands, self._config.rows).T:
            keys = mix(keys ^ row)
        return keys & ~np.uint64(EXACT)


class KeyWriter:
    """Writes keys so that those of a partition can be read alone.

    A file is a sequence of chunks: where each partition's rows begin (int64 [partitions + 1]), then the rows.
    """

    def __init__(self, stream: BinaryIO, partitions: int) -> None:
        self._stream, self._partitions = stream, partitions
        self._waiting: list[NDArray[Any]] = []

    def add(self, document: int, keys: NDArray[np.uint64]) -> None:
        """The keys of the shard's document of that number."""
        rows = np.empty(len(keys), ROW)
        rows["key"], rows["document"] = keys, document
        self._waiting.append(rows)
        if len(self._waiting) == _DOCUMENTS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what has been added; also after the last."""
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting)
        self._waiting = []
        partition = _partition(rows["key"], self._partitions)
        rows = rows[np.argsort(partition, kind="stable")]
        counts = np.bincount(partition, minlength=self._partitions)
        np.concatenate([[0], np.cumsum(counts)]).astype("<i8").tofile(self._stream)
        rows.tofile(self._stream)


def read_keys(path: Path, partition: int, partitions: int) -> NDArray[Any]:
    """The rows of one partition, in the order of their documents.

    Raises:
        DataError: the file cannot be read, or ends within a chunk.
    """
    found, header = [], 8 * (partitions + 1)
    try:
        with path.open("rb") as stream:
            while head := stream.read(header):
                places = np.frombuffer(head, "<i8")
                start, first, end = stream.tell(), int(places[partition]), int(places[partition + 1])
                stream.seek(start + first * ROW.itemsize)
                found.append(np.frombuffer(stream.read((end - first) * ROW.itemsize), ROW))
                if len(found[-1]) != end - first:
                    raise DataError(f"{path} is truncated: remove it and its record, and clean again")
                stream.seek(start + int(places[-1]) * ROW.itemsize)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}, it is damaged or unreadable: {error}") from None
    return np.concatenate(found) if found else np.empty(0, ROW)


def _partition(keys: NDArray[np.uint64], partitions: int) -> NDArray[np.int64]:
    return ((keys >> np.uint64(32)) % np.uint64(partitions)).astype(np.int64)
