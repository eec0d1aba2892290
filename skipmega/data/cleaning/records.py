"""What tasks leave beside their results: what was done, of what, and what was dropped."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from skipmega.data.files import atomic_write, sha256_of
from skipmega.data.pairs.manifest import FileRecord, SourceRecord
from skipmega.errors import DataError

StageName = Literal["filter", "match", "sift"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Amount(_Record):
    """Documents and their UTF-8 bytes."""

    documents: int = 0
    bytes: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(documents=self.documents + other.documents, bytes=self.bytes + other.bytes)


class TaskRecord(_Record):
    """A finished task: ``made_of`` is what its result depends on, ``files`` its result (by path below the
    cleaning's folder), ``given`` and ``dropped`` (by reason) what became of its documents, ``found`` the
    examples of evaluation sets that were met."""

    stage: StageName
    number: int
    made_of: dict[str, str]
    code: str
    files: dict[str, FileRecord]
    sources: tuple[SourceRecord, ...] = ()
    given: Amount = Amount()
    kept: Amount = Amount()
    dropped: dict[str, Amount] = {}
    bad_records: int = 0
    found: dict[str, list[int]] = {}
    contaminated: dict[str, int] = {}


class Tally:
    """Counts what is given, kept and dropped."""

    def __init__(self) -> None:
        self._documents: Counter[str | None] = Counter()
        self._bytes: Counter[str | None] = Counter()

    def count(self, size: int, reason: str | None) -> None:
        """A document of ``size`` bytes was dropped for ``reason``, or kept (None)."""
        self._documents[reason] += 1
        self._bytes[reason] += size

    @property
    def kept(self) -> Amount:
        """What was not dropped."""
        return self._amount(None)

    @property
    def dropped(self) -> dict[str, Amount]:
        """By reason, most documents first."""
        return {reason: self._amount(reason) for reason, _ in self._documents.most_common() if reason}

    def _amount(self, reason: str | None) -> Amount:
        return Amount(documents=self._documents[reason], bytes=self._bytes[reason])


def task_path(folder: Path, stage: StageName, number: int) -> Path:
    """Where the record of a task is."""
    return folder / "records" / stage / f"{number:05d}.json"


def read_record(folder: Path, stage: StageName, number: int) -> TaskRecord | None:
    """The record of a task, None if it is not finished.

    Raises:
        DataError: it cannot be read, or a file of its result is not there, or not of its size.
    """
    path = task_path(folder, stage, number)
    try:
        record = TaskRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"{path} is not a record that this version reads ({first['msg']}): remove it, and clean again"
        ) from None
    for name, file in record.files.items():
        check_size(folder / name, file, f"remove {path} and clean again")
    return record


def check_size(path: Path, file: FileRecord, mend: str) -> None:
    """Refuse a file of another size than it was recorded with.

    Raises:
        DataError: it is missing, truncated or another.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {mend}") from None
    if size != file.bytes:
        raise DataError(f"{path} has {size} bytes, its record says {file.bytes}: {mend}")


def check_content(folder: Path, record: TaskRecord) -> None:
    """Refuse results of a task that are not what it wrote, to the last bit.

    Raises:
        DataError: naming the file.
    """
    record_file = task_path(folder, record.stage, record.number)
    for name, file in record.files.items():
        found = sha256_of(folder / name)
        if found != file.sha256:
            raise DataError(
                f"{folder / name} is damaged or another: its SHA-256 is {found}, {record_file} says "
                f"{file.sha256}: remove that record and clean again"
            )


def need_record(folder: Path, stage: StageName, number: int) -> TaskRecord:
    """The record of a task on which others build.

    Raises:
        DataError: it is not finished.
    """
    record = read_record(folder, stage, number)
    if record is None:
        raise DataError(f"task {number} of stage {stage} is not done ({task_path(folder, stage, number)} is "
                        "missing): run it first")  # fmt: skip
    return record


def write_record(folder: Path, record: TaskRecord) -> None:
    """Say that a task is finished; what it wrote is on disk by then."""
    with atomic_write(task_path(folder, record.stage, record.number)) as stream:
        stream.write(record.model_dump_json(indent=1).encode() + b"\n")


def check_made_of(folder: Path, record: TaskRecord, made_of: Mapping[str, str]) -> None:
    """Refuse a finished task whose result depends on something else than it would now.

    Raises:
        DataError: naming what differs.
    """
    for what in made_of.keys() | record.made_of.keys():
        there, here = record.made_of.get(what), made_of.get(what)
        if there != here:
            raise DataError(
                f"{task_path(folder, record.stage, record.number)} was made of something else: {what}: "
                f"{there} there, {here} here; remove {folder} to start again, or choose another output"
            )


def record_files(folder: Path, paths: list[Path]) -> dict[str, FileRecord]:
    """Sizes and checksums of what a task has written."""
    return {
        str(path.relative_to(folder)): FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in paths
    }


def code_hash() -> str:
    """SHA-256 of the source of skipmega's data code, as it is on disk."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()
