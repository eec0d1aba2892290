"""A run's ``metrics.jsonl`` as one history, whatever crashes and resumes it went through."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipmega.errors import DataError

Record = dict[str, Any]

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunMetrics:
    """The records that count, by rising step.

    ``train`` and ``evaluations`` hold the "train" and "eval" records; ``resumed_at`` the steps that were
    done when the run was continued, in the order it happened.
    """

    train: list[Record]
    evaluations: list[Record]
    resumed_at: list[int]

    def routed(self) -> list[Record]:
        """The train records that tell the executed share of routed layers.

        Only those with the layers of the last one: a run has one architecture.
        """
        told = [record for record in self.train if record.get("density")]
        return [record for record in told if record["routed_layers"] == told[-1]["routed_layers"]]


def read_metrics(path: str | Path) -> RunMetrics:
    """Read a ``metrics.jsonl``.

    A run that stops and resumes from an earlier checkpoint repeats steps. What an attempt wrote beyond
    the step where the next one began is void, and of two records of one step the later counts. A line
    that a killed process left half-written is skipped with a warning.

    Raises:
        DataError: there is no such file, or no train record in it.
    """
    path = Path(path)
    train: dict[int, Record] = {}
    evaluations: dict[int, Record] = {}
    resumed_at: list[int] = []
    for record in _records(path):
        kind, step = record.get("kind"), record.get("step")
        if not isinstance(step, int):
            continue
        if kind == "start":
            for history in (train, evaluations):
                for void in [known for known in history if known > step]:
                    del history[void]
            if step > 0:
                resumed_at.append(step)
        elif kind == "train":
            train[step] = record
        elif kind == "eval":
            evaluations[step] = record
    if not train:
        raise DataError(f"{path} has no record of a training step: give the metrics.jsonl of a run")
    return RunMetrics(
        train=[train[step] for step in sorted(train)],
        evaluations=[evaluations[step] for step in sorted(evaluations)],
        resumed_at=resumed_at,
    )


def _records(path: Path) -> Iterator[Record]:
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    _LOGGER.warning("%s, line %d is not JSON: skipped", path, number)
                    continue
                if isinstance(record, dict):
                    yield record
    except OSError as error:
        raise DataError(f"cannot read metrics file {path}: {error.strerror}") from None
