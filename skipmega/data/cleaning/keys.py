"""Keys that equal documents share: one for all of their text, and one for each band of its MinHashes."""

import hashlib
import os
import zlib
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

    A file is a sequence of chunks: how many rows each partition has and their CRC-32 (int64 [2, partitions]),
    then the rows.
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
        sums = [zlib.crc32(part.tobytes()) for part in np.split(rows, np.cumsum(counts)[:-1])]
        self._stream.write(np.array([counts, sums], "<i8").tobytes() + rows.tobytes())


def read_keys(path: Path, partition: int, partitions: int) -> NDArray[Any]:
    """The rows of one partition, in the order of their documents.

    Raises:
        DataError: the file cannot be read, or is damaged.
    """
    found = []
    try:
        with path.open("rb") as stream:
            while head := stream.read(16 * partitions):
                counts, sums = np.frombuffer(head, "<i8").reshape(2, partitions)
                stream.seek(int(counts[:partition].sum()) * ROW.itemsize, os.SEEK_CUR)
                content = stream.read(int(counts[partition]) * ROW.itemsize)
                if zlib.crc32(content) != sums[partition]:
                    raise ValueError(f"the rows that end at byte {stream.tell()} are not those written")
                found.append(np.frombuffer(content, ROW))
                stream.seek(int(counts[partition + 1 :].sum()) * ROW.itemsize, os.SEEK_CUR)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}, it is damaged or unreadable: {error}") from None
    return np.concatenate(found) if found else np.empty(0, ROW)


def _partition(keys: NDArray[np.uint64], partitions: int) -> NDArray[np.int64]:
    return ((keys >> np.uint64(32)) % np.uint64(partitions)).astype(np.int64)
