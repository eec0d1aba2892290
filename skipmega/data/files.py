"""Files that are either whole or absent under their final name, and what they are called."""

import glob
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from skipmega.errors import DataError

_PIECE = 16 * 2**20  # bytes


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears as ``path`` (replacing it) only if the block ends without an error.

    It is written beside ``path`` under a hidden name of this process, flushed to disk and renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until the written file ``path`` is on disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    In large pieces: beside training, each asks for the interpreter once, and the training thread waits.
    """
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def find_pairs(path: str) -> list[str]:
    """The pairs that a source's path stands for, without their endings, in the order of their names.

    A path without ``*``, ``?`` and ``[`` is that of one pair, whether it exists or not.

    Raises:
        DataError: nothing fits a pattern.
    """
    if not glob.has_magic(path):
        return [path]
    found = sorted(str(Path(index).with_suffix("")) for index in glob.glob(f"{path}.idx"))
    if not found:
        raise DataError(f"no data set fits {path}: there is no {path}.idx")
    return found
