"""Documents between stages: JSON lines with where each came from, compressed, with checksums."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import zstandard

from skipmega.data.corpora.readers import Document, read_lines
from skipmega.data.files import atomic_write
from skipmega.errors import DataError


class TextWriter:
    """Writes JSON lines."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def add(self, **values: str) -> None:
        """One line."""
        self._stream.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")


@contextmanager
def write_texts(path: Path) -> Iterator[TextWriter]:
    """A ``.jsonl.zst`` file that is there when it is whole."""
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
    with atomic_write(path) as raw, compressor.stream_writer(raw, closefd=False) as stream:
        yield TextWriter(stream)


def read_texts(path: Path, documents: int) -> Iterator[Document]:
    """The documents of a file that :func:`write_texts` wrote, ``documents`` of them.

    Raises:
        DataError: it is missing, damaged, or another.
    """
    number = 0
    for number, line in enumerate(read_lines(path), start=1):
        try:
            values = json.loads(line)
            yield Document(values["text"], values["from"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number} is not what skipmega wrote there ({error!r})") from None
    if number != documents:
        raise DataError(f"{path} holds {number} documents, its record says {documents}: another file's copy?")
