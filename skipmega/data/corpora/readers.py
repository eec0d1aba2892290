"""Documents out of corpus files: JSON lines, WARC text (both plain, gzip, zstd), parquet, plain text.

The ending of a name decides: ``.jsonl .json .ndjson .wet .warc``, each alone or with ``.gz`` or ``.zst``, and
``.parquet``; a file with any other name is one plain-text document. A folder stands for all its files,
sub-folders included, hidden ones not, in the order of their relative names.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.parquet
import zstandard

from skipmega.data.corpora.cleaned import is_cleaned, open_cleaned
from skipmega.data.corpora.warc import WarcError, read_conversions
from skipmega.errors import DataError

_JSON_LINES = (".jsonl", ".json", ".ndjson")
_WARC = (".wet", ".warc")
_PARQUET_ROWS = 1024
_CHUNK_BYTES = 1 << 20
_UNREADABLE = (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException, WarcError)


@dataclass(frozen=True)
class Document:
    """One document: its text and where it came from, ``file:line`` (of parquet the row, of WARC the record;
    all from 1)."""

    text: str
    where: str


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus and its size on disk in bytes."""

    path: Path
    size: int


class Corpus:
    """The documents of files and folders, in a fixed order.

    Iterating reads everything from the start. While it runs, ``bytes_read`` tells how many of the
    ``total_bytes`` on disk have been consumed, ``bad_records`` how many records were skipped, ``last_bad``
    why the latest of them was. Of a folder that tools/clean_data.py has made, its clean text is read;
    ``cleaned`` says what was done to it.

    Args:
        paths: files and folders, read in this order.
        text_field: the field (JSON) or column (parquet) that holds the text.
        skip_bad: skip and count records without usable text instead of raising.

    Raises:
        DataError: a path is missing, or nothing but empty files is found. While iterating: a record without
            usable text (unless ``skip_bad``), or a damaged file (always, for the rest of it is lost).
    """

    def __init__(
        self, paths: Sequence[str | Path], *, text_field: str = "text", skip_bad: bool = False
    ) -> None:
        cleaned = {path: open_cleaned(Path(path)) for path in paths if is_cleaned(Path(path))}
        self.cleaned = tuple(record for _, record in cleaned.values())
        named = (file for path in paths for file in (cleaned[path][0] if path in cleaned else [path]))
        self.files = tuple(file for path in named for file in _list_files(Path(path)))
        self.total_bytes = sum(file.size for file in self.files)
        if self.total_bytes == 0:
            names = ", ".join(map(str, paths)) or "no path was given"
            raise DataError(f"the corpus is empty: {len(self.files)} files with 0 bytes ({names})")
        self.text_field = text_field
        self.skip_bad = skip_bad
        self.bytes_read = 0
        self.bad_records = 0
        self.last_bad = ""

    def __iter__(self) -> Iterator[Document]:
        self.bytes_read = self.bad_records = 0
        self.last_bad = ""
        done = 0
        for file in self.files:
            for record, consumed in _read_file(file, self.text_field):
                self.bytes_read = done + consumed
                if isinstance(record, Document):
                    yield record
                else:
                    self._refuse(record)
            done += file.size
        self.bytes_read = self.total_bytes

    def _refuse(self, bad: "_BadRecord") -> None:
        self.last_bad = f"{bad.where}: {bad.reason}"
        if not self.skip_bad:
            raise DataError(f"{self.last_bad}; mend the record, or skip such records with --skip-bad")
        self.bad_records += 1


@dataclass(frozen=True)
class _BadRecord:
    where: str
    reason: str


_Record = Document | _BadRecord


def first_bytes(documents: Iterator[Document], limit: int) -> Iterator[Document]:
    """The documents up to and including the one that reaches ``limit`` bytes of UTF-8."""
    taken = 0
    for document in documents:
        yield document
        taken += len(document.text.encode())
        if taken >= limit:
            return


def _list_files(path: Path) -> list[SourceFile]:
    if not path.exists():
        raise DataError(f"corpus {path} does not exist")
    if path.is_file():
        return [SourceFile(path, path.stat().st_size)]
    names = sorted(
        (file.relative_to(path) for file in path.rglob("*") if file.is_file()), key=lambda name: name.parts
    )
    visible = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return [SourceFile(path / name, (path / name).stat().st_size) for name in visible]


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that may be compressed.

    Raises:
        DataError: it is damaged or unreadable.
    """
    try:
        with path.open("rb") as raw:
            yield from _decompressed(raw, path.suffix)
    except _UNREADABLE as error:
        raise DataError(f"cannot read {path}, it is damaged or unreadable: {error}") from None


def _read_file(file: SourceFile, text_field: str) -> Iterator[tuple[_Record, int]]:
    """Records of one file, each with the bytes on disk consumed so far."""
    suffixes = [suffix.lower() for suffix in file.path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else ""
    kind = suffixes[-1] if suffixes else ""
    try:
        with file.path.open("rb") as raw:
            if kind == ".parquet" and not compression:
                yield from _read_parquet(file, raw, text_field)
            elif kind in _JSON_LINES:
                yield from _read_json_lines(file.path, raw, compression, text_field)
            elif kind in _WARC:
                for number, content in read_conversions(_decompressed(raw, compression)):
                    yield _checked_text(content, f"{file.path}:{number}"), raw.tell()
            else:
                content = _decompressed(raw, compression).read()
                yield _checked_text(content, f"{file.path}:1"), file.size
    except _UNREADABLE as error:
        raise DataError(f"cannot read {file.path}, it is damaged or unreadable: {error}") from None


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    if compression == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if compression == ".zst":
        return io.BufferedReader(_ZstdReader(raw), _CHUNK_BYTES)
    return raw


def _read_json_lines(
    path: Path, raw: BinaryIO, compression: str, text_field: str
) -> Iterator[tuple[_Record, int]]:
    for number, line in enumerate(_decompressed(raw, compression), start=1):
        if line.strip():
            yield _parse_line(line, text_field, f"{path}:{number}"), raw.tell()


def _parse_line(line: bytes, text_field: str, where: str) -> _Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _BadRecord(where, f"not a line of JSON ({error})")
    if not isinstance(value, dict):
        return _BadRecord(where, f"a JSON {type(value).__name__} where an object is expected")
    if text_field not in value:
        return _BadRecord(where, f"no field {text_field!r}, only {', '.join(map(repr, value)) or 'none'}")
    return _checked_text(value[text_field], where, text_field)


def _read_parquet(file: SourceFile, raw: BinaryIO, text_field: str) -> Iterator[tuple[_Record, int]]:
    table = pyarrow.parquet.ParquetFile(raw)
    if text_field not in table.schema_arrow.names:
        columns = ", ".join(map(repr, table.schema_arrow.names))
        raise DataError(f"{file.path}: no column {text_field!r}, only {columns}; name the text's column")
    number, rows = 0, table.metadata.num_rows
    for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
        for value in batch.column(0).to_pylist():
            number += 1
            record = _checked_text(value, f"{file.path}:{number}", text_field)
            yield record, file.size * number // rows


def _checked_text(value: Any, where: str, text_field: str = "") -> _Record:
    """A document if ``value`` is text that UTF-8 can represent (bytes are decoded)."""
    try:
        if isinstance(value, bytes):
            return Document(value.decode(), where)
        if isinstance(value, str):
            value.encode()
            return Document(value, where)
    except UnicodeError as error:
        return _BadRecord(where, f"not valid UTF-8 ({error})")
    return _BadRecord(where, f"field {text_field!r} holds {type(value).__name__}, not text")


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a zstd file of one or more frames.

    zstandard's own stream reader ends quietly where a file was cut off; this one raises :class:`EOFError`.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._compressed:
                self._compressed = self._raw.read(_CHUNK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the zstd stream ends in the middle of a frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(self._compressed)
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
