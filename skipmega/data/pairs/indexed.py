"""Checks a prepared data set before megatron-core maps it into memory.

megatron-core trusts the files: a truncated ``.bin`` is a crash (or zeros) in the middle of a run, an id
outside the vocabulary a device-side assert. Here both are one sentence before the run starts.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipmega.data.files import sha256_of
from skipmega.data.pairs.manifest import FileRecord, Manifest, manifest_path, read_manifest
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, sequences, document boundaries
_TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CHUNK = 1 << 22


@dataclass(frozen=True)
class CheckedDataset:
    """A ``.bin``/``.idx`` pair whose parts fit each other, the tokenizer and the manifest.

    Attributes:
        prefix: its path without the ending.
        lengths: int32 [documents], tokens of each document, mapped from the ``.idx``.
        tokens: their sum.
        index_sha256: SHA-256 of the ``.idx``, from which alone samples are cut.
    """

    prefix: str
    lengths: NDArray[np.int32]
    tokens: int
    index_sha256: str


def check_dataset(prefix: str, tokenizer: Tokenizer) -> CheckedDataset:
    """Check a pair against itself, its manifest (if it has one) and the run's tokenizer.

    With a manifest the cost is that of reading the ``.idx``; without one all tokens are read once, to see
    that each is an id of ``tokenizer``.

    Args:
        prefix: path of the pair without the ending.
        tokenizer: the tokenizer of the run.

    Raises:
        DataError: a file is missing, truncated or foreign (naming it, its size and the expected one); the
            pair was made with another tokenizer; a token id lies outside the vocabulary.
    """
    manifest = read_manifest(prefix)
    if manifest is not None:
        if manifest.packed_for is not None:
            raise DataError(
                f"{prefix} is packed for samples of {manifest.packed_for} tokens, and data.order=documents "
                "cuts samples of its own: set data.order=stream"
            )
        _check_tokenizer(prefix, manifest, tokenizer)
        for ending, record in (("bin", manifest.bin), ("idx", manifest.idx)):
            _check_size(prefix, ending, record)
    index = _Index.read(prefix)
    index.check(Path(f"{prefix}.bin"))
    highest = manifest.max_token_id if manifest is not None else _highest_token(prefix, index.dtype)
    if highest >= tokenizer.size:
        raise DataError(
            f"{prefix}.bin holds token id {highest}, but {tokenizer.path} has {tokenizer.size} ids "
            f"(0..{tokenizer.size - 1}): use the tokenizer that the data was made with"
        )
    return CheckedDataset(
        prefix=prefix,
        lengths=index.lengths,
        tokens=index.tokens,
        index_sha256=manifest.idx.sha256 if manifest is not None else sha256_of(Path(f"{prefix}.idx")),
    )


@dataclass(frozen=True)
class OpenedPair:
    """A pair of which only sizes, header and manifest have been read, however large it is.

    Attributes:
        prefix: its path without the ending.
        documents, tokens: how many it holds.
        dtype: numpy's name of the type of a token.
        sha256: of ``.idx`` and, with a manifest, of ``.bin``.
        packed_for: the sequence length that its documents are packed for; None if they lie end to end.
        padding: tokens that fill packed samples up.
    """

    prefix: str
    documents: int
    tokens: int
    dtype: str
    sha256: str
    packed_for: int | None = None
    padding: int = 0

    def tokens_before(self, document: int) -> int:
        """Tokens of the documents before ``document``, which may be ``documents``."""
        if document == self.documents:
            return self.tokens
        return int(_Index.read(self.prefix).pointers[document]) // np.dtype(self.dtype).itemsize


def open_dataset(prefix: str, tokenizer: Tokenizer) -> OpenedPair:
    """Check that a pair fits its manifest and the run's tokenizer, by sizes alone.

    A pair without a manifest is checked as :func:`check_dataset` does, all of it.

    Raises:
        DataError: as :func:`check_dataset`; what only the content shows, it does not see.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        checked = check_dataset(prefix, tokenizer)
        dtype = np.dtype(_Index.read(prefix).dtype).name
        return OpenedPair(prefix, len(checked.lengths), checked.tokens, dtype, checked.index_sha256)
    _check_tokenizer(prefix, manifest, tokenizer)
    for ending, record in (("bin", manifest.bin), ("idx", manifest.idx)):
        _check_size(prefix, ending, record)
    index = _Index.read(prefix)
    found = (len(index.lengths), np.dtype(index.dtype).name)
    if found != (manifest.documents, manifest.dtype):
        raise DataError(
            f"{index.path} describes {found[0]} documents of {found[1]} tokens, its manifest says "
            f"{manifest.documents} of {manifest.dtype}: one of the two belongs to another data set"
        )
    if manifest.bin.bytes != manifest.tokens * np.dtype(index.dtype).itemsize:
        raise DataError(
            f"{manifest_path(prefix)} contradicts itself: {manifest.tokens} tokens of {manifest.dtype} are "
            f"not {manifest.bin.bytes} bytes; prepare the data again"
        )
    sums = f"{manifest.idx.sha256} {manifest.bin.sha256}"
    padding = manifest.arranged.padding if manifest.arranged is not None else 0
    return OpenedPair(
        prefix, manifest.documents, manifest.tokens, manifest.dtype, sums, manifest.packed_for, padding
    )


def document_places(prefix: str) -> tuple[Any, NDArray[np.int32], NDArray[np.int64]]:
    """A token's type, and of each document its tokens and the byte where it begins, mapped from the ``.idx``.

    Raises:
        DataError: the ``.idx`` is missing or foreign, or does not describe the ``.bin``.
    """
    index = _Index.read(prefix)
    index.check(Path(f"{prefix}.bin"))
    return index.dtype, index.lengths, index.pointers


def verify_checksums(prefix: str) -> Manifest:
    """Read a whole pair and compare it with the checksums of its manifest.

    Raises:
        DataError: there is no manifest, a file is missing, or its content differs.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        raise DataError(f"{manifest_path(prefix)} is missing: there are no checksums to compare with")
    for ending, record in (("bin", manifest.bin), ("idx", manifest.idx)):
        _check_size(prefix, ending, record)
        found = sha256_of(Path(f"{prefix}.{ending}"))
        if found != record.sha256:
            raise DataError(
                f"{prefix}.{ending} is damaged: its SHA-256 is {found}, the manifest says {record.sha256}"
            )
    return manifest


def _check_tokenizer(prefix: str, manifest: Manifest, tokenizer: Tokenizer) -> None:
    made_with = manifest.tokenizer
    if made_with.sha256 != tokenizer.sha256:
        raise DataError(
            f"{prefix} was made with a tokenizer of SHA-256 {made_with.sha256} ({made_with.vocab_size} ids), "
            f"but the run's tokenizer {tokenizer.path} is {tokenizer.sha256} ({tokenizer.size} ids): give "
            "data.tokenizer the former, or prepare the data again"
        )


def _check_size(prefix: str, ending: str, record: FileRecord) -> None:
    path = Path(f"{prefix}.{ending}")
    found = _file_size(path)
    if found != record.bytes:
        raise DataError(
            f"{path} has {found} bytes, its manifest says {record.bytes}: the file was truncated or "
            "replaced; copy or prepare it again"
        )


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; a data set is named without its ending, and "
            "tools/prepare_data.py makes one"
        ) from None


@dataclass(frozen=True)
class _Index:
    """An ``.idx`` file: token type, int32 ``lengths`` and int64 byte ``pointers`` of n sequences, and the
    int64 ``boundaries`` of documents among them (0 first, n last)."""

    path: Path
    dtype: Any
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    boundaries: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @classmethod
    def read(cls, prefix: str) -> "_Index":
        """Map the arrays of ``<prefix>.idx``; only header and size have been checked."""
        path = Path(f"{prefix}.idx")
        found = _file_size(path)
        if found < _HEADER.size:
            raise DataError(f"{path} has {found} bytes, less than the {_HEADER.size} of an index's header")
        with path.open("rb") as stream:
            magic, version, code, sequences, boundaries = _HEADER.unpack(stream.read(_HEADER.size))
        if magic != _MAGIC or version != 1:
            raise DataError(
                f"{path} is not a megatron-core index: it starts with {magic!r} (version {version}), "
                f"expected {_MAGIC!r} (version 1)"
            )
        if code not in _TOKEN_TYPES:
            raise DataError(f"{path} holds tokens of type code {code}, known are {sorted(_TOKEN_TYPES)}")
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        if found != expected:
            raise DataError(
                f"{path} has {found} bytes, but {sequences} sequences and {boundaries} document boundaries "
                f"need {expected}: the file is truncated or no text index"
            )
        content = np.memmap(path, mode="r")
        pointers_at = _HEADER.size + 4 * sequences
        boundaries_at = pointers_at + 8 * sequences
        return cls(
            path=path,
            dtype=_TOKEN_TYPES[code],
            lengths=np.frombuffer(content, np.int32, sequences, _HEADER.size),
            pointers=np.frombuffer(content, np.int64, sequences, pointers_at),
            boundaries=np.frombuffer(content, np.int64, boundaries, boundaries_at),
        )

    def check(self, data: Path) -> None:
        """Refuse an index that does not describe ``data`` exactly."""
        found, itemsize = _file_size(data), np.dtype(self.dtype).itemsize
        expected = self.tokens * itemsize
        if found != expected:
            raise DataError(
                f"{data} has {found} bytes, but {self.path} describes {self.tokens} tokens of {itemsize} "
                f"bytes, {expected} in all: one of the two is truncated or belongs to another data set"
            )
        if found == 0:
            raise DataError(f"{data} is empty: prepare the data again")
        edges = self.boundaries
        if (
            len(edges) == 0
            or edges[0] != 0
            or edges[-1] != len(self.lengths)
            or (edges[1:] < edges[:-1]).any()
        ):
            raise DataError(f"{self.path} is damaged: its document boundaries are not in order")
        start = 0
        for at in range(0, len(self.lengths), _CHUNK):
            lengths = self.lengths[at : at + _CHUNK].astype(np.int64)
            ends = start + np.cumsum(lengths) * itemsize
            if lengths.min() < 0 or (self.pointers[at : at + _CHUNK] != ends - lengths * itemsize).any():
                raise DataError(f"{self.path} is damaged: its pointers do not follow from its lengths")
            start = int(ends[-1])


def _highest_token(prefix: str, dtype: Any) -> int:
    """The largest id of a ``.bin`` file, read once from start to end."""
    path = Path(f"{prefix}.bin")
    highest, lowest = -1, 0
    for at in range(0, path.stat().st_size, _CHUNK * np.dtype(dtype).itemsize):
        tokens = np.fromfile(path, dtype, _CHUNK, offset=at)
        highest, lowest = max(highest, int(tokens.max())), min(lowest, int(tokens.min()))
    if lowest < 0:
        raise DataError(f"{path} holds token id {lowest}: ids are not negative")
    return highest
