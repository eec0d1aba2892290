"""What the makers of local tasks share: records in jsonl files, YAML files, names."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from skipmega.data.files import atomic_write
from skipmega.errors import ConfigError, DataError

Record = dict[str, Any]

ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
NORMED_ACCURACY = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def check_task_name(name: str) -> None:
    """Refuse what cannot name a task and its file."""
    if not _TASK_NAME.fullmatch(name):
        raise ConfigError(f"task name {name!r}: use letters, digits, dots, dashes and underscores")


def read_jsonl(path: Path) -> list[Record]:
    """The records of a jsonl file, one or more."""
    records = [record for _, record in numbered_records(path)]
    if not records:
        raise DataError(f"{path} is empty")
    return records


def numbered_records(path: Path) -> Iterator[tuple[int, Record]]:
    """The records of a jsonl file with their line numbers, from 1."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number} is not UTF-8: {error}") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number} is not a JSON object")
            yield number, record


def write_jsonl(path: Path, records: Sequence[Record]) -> None:
    """One record a line, atomically."""
    with atomic_write(path) as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def write_yaml(path: Path, values: Record) -> None:
    """A YAML file, atomically."""
    with atomic_write(path) as stream:
        stream.write(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())
