"""Folders that tools/clean_data.py has made, as corpora."""

import hashlib
from pathlib import Path

from pydantic import ValidationError

from skipmega.data.pairs.manifest import CLEANING_FILE, CleanedFiles, CleaningRecord
from skipmega.errors import DataError


def is_cleaned(folder: Path) -> bool:
    """Whether ``folder`` is the finished result of a cleaning."""
    return (folder / CLEANING_FILE).is_file()


def open_cleaned(folder: Path) -> tuple[list[Path], CleaningRecord]:
    """The files of clean text in a folder, and what is to be remembered of how they came about.

    Raises:
        DataError: a file is missing or not of the recorded size, or the record cannot be read.
    """
    path = folder / CLEANING_FILE
    try:
        content = path.read_bytes()
        cleaned = CleanedFiles.model_validate_json(content)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        raise DataError(
            f"{path} is not what tools/clean_data.py writes: {error.errors()[0]['msg']}"
        ) from None
    for name, file in cleaned.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise DataError(f"cannot read {folder / name}: {error.strerror}; {path} lists it") from None
        if size != file.bytes:
            raise DataError(f"{folder / name} has {size} bytes, {path} says {file.bytes}: clean again")
    record = CleaningRecord(
        path=str(folder),
        sha256=hashlib.sha256(content).hexdigest(),
        given=cleaned.given,
        kept=cleaned.kept,
        dropped=cleaned.dropped,
    )
    return [folder / name for name in cleaned.files], record
