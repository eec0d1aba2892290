"""What a prepared data set says of itself: ``<prefix>.manifest.json`` beside its ``.bin`` and ``.idx``."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from skipmega.errors import DataError

CLEANING_FILE = "cleaning.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


class SourceRecord(_Record):
    """A corpus file as it was named, and its size in bytes."""

    path: str
    bytes: int


class TokenizerRecord(_Record):
    """The tokenizer that made the tokens."""

    sha256: str
    vocab_size: int
    eod_id: int


class CleanedFiles(BaseModel):
    """The part of ``cleaning.json`` that tells the clean text: its ``files``, by their path beside it, and
    how many documents were ``given``, ``kept``, and ``dropped``, by reason."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    files: dict[str, FileRecord]
    given: int
    kept: int
    dropped: dict[str, int]


class CleaningRecord(_Record):
    """What tools/clean_data.py did to a corpus before: ``sha256`` of its ``cleaning.json``, and the
    documents that it was given, kept, and dropped, by reason."""

    path: str
    sha256: str
    given: int
    kept: int
    dropped: dict[str, int]


class ArrangementRecord(_Record):
    """Where the documents of a pair come from that tools/data.py shuffle has made.

    Of ``pairs`` pairs, whose ``.bin`` files have SHA-256 that together have ``content``, these are those of
    shard ``shard`` of ``shards`` in an order drawn of ``seed``. With a ``sequence_length`` they are packed:
    every ``sequence_length + 1`` tokens are a sample, filled up with ends of documents; ``padding`` counts
    these tokens, ``cut`` the documents that are in several samples.
    """

    seed: int
    pairs: int
    content: str
    shard: int
    shards: int
    sequence_length: int | None = None
    padding: int = 0
    cut: int = 0


class Manifest(_Record):
    """Contents and origin of one ``.bin``/``.idx`` pair.

    ``documents``, ``tokens`` (ends of documents included), ``text_bytes`` (UTF-8) and ``max_token_id``
    describe the pair; ``empty_documents`` and ``bad_records`` were skipped in ``sources``, which may also
    have filled other pairs: ``part`` says which share of them this is, ``arranged`` which documents of that
    share and in what order, None for all in the corpus's; of a shard ``text_bytes`` is an estimate, by
    tokens. ``cleaned`` are the cleanings of which the corpus is the result.
    """

    format: Literal[1] = 1
    skipmega_version: str
    part: Literal["all", "train", "valid"]
    valid_fraction: float
    documents: int
    tokens: int
    text_bytes: int
    max_token_id: int
    dtype: str
    bin: FileRecord
    idx: FileRecord
    empty_documents: int
    bad_records: int
    text_field: str
    sources: tuple[SourceRecord, ...]
    tokenizer: TokenizerRecord
    arranged: ArrangementRecord | None = None
    cleaned: tuple[CleaningRecord, ...] = ()

    @property
    def packed_for(self) -> int | None:
        """The sequence length that the pair is packed for, None if it is not packed."""
        return self.arranged.sequence_length if self.arranged is not None else None


def manifest_path(prefix: str | Path) -> Path:
    """Where the manifest of the pair ``prefix`` is."""
    return Path(f"{prefix}.manifest.json")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of the pair ``prefix``, None if it has none.

    Raises:
        DataError: there is one that cannot be read.
    """
    path = manifest_path(prefix)
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{path} is not a manifest that this version reads ({field}: {first['msg']}): prepare the data "
            "again, or remove the manifest to have the pair checked token by token"
        ) from None
