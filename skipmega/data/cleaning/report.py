"""What a cleaning has done, in one file: ``cleaning.json`` in its folder, and a table for people."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from skipmega import __version__
from skipmega.data.cleaning.config import CleaningConfig
from skipmega.data.cleaning.contamination import EvaluationTexts
from skipmega.data.cleaning.records import Amount, TaskRecord, need_record
from skipmega.data.cleaning.stages import STAGES, count_tasks
from skipmega.data.files import atomic_write
from skipmega.data.pairs.manifest import CLEANING_FILE, CleanedFiles, FileRecord, SourceRecord

_LIBRARIES = ("datatrove", "spacy", "numpy", "zstandard", "pyarrow")


class SetReport(BaseModel):
    """An evaluation set: its examples, those too short to be searched for, those that were found (at least:
    of examples that share a run of words, one is named), and the documents dropped for it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    examples: int
    too_short: int
    found: int
    documents: int


class CleaningReport(CleanedFiles):
    """All of ``cleaning.json``."""

    skipmega_version: str
    code: tuple[str, ...]
    versions: dict[str, str]
    config: dict[str, Any]
    sources: tuple[SourceRecord, ...]
    bad_records: int
    amounts: dict[str, Amount]
    evaluation_sets: dict[str, SetReport]

    def table(self) -> str:
        """What came in, what each reason dropped, what is left; then the evaluation sets."""
        total = self.amounts["given"]
        lines = [f"{'':44}{'documents':>12}{'':>9}{'MB':>10}"]
        for name, amount in self.amounts.items():
            share = amount.documents / max(total.documents, 1)
            lines.append(f"{name:44}{amount.documents:>12}{share:>9.2%}{amount.bytes / 1e6:>10.2f}")
        for name, found in self.evaluation_sets.items():
            lines.append(
                f"evaluation set {name}: {found.found} of {found.examples} examples found in "
                f"{found.documents} documents; {found.too_short} too short to search for"
            )
        return "\n".join(lines)


def write_report(config: CleaningConfig) -> CleaningReport:
    """Sum up all tasks into ``cleaning.json``; tools/prepare_data.py takes the folder from then on.

    Raises:
        DataError: a task is not done.
    """
    folder = Path(config.output)
    records = {
        stage: [need_record(folder, stage, number) for number in range(count_tasks(config, stage))]
        for stage in STAGES
    }
    amounts = _amounts(records["filter"], records["sift"])
    report = CleaningReport(
        skipmega_version=__version__,
        code=tuple(sorted({record.code for part in records.values() for record in part})),
        versions=_versions(),
        config=config.model_dump(mode="json"),
        sources=tuple(source for record in records["filter"] for source in record.sources),
        bad_records=sum(record.bad_records for record in records["filter"]),
        amounts=amounts,
        evaluation_sets=_set_reports(config, records["sift"]),
        files=_text_files(records["sift"]),
        given=amounts["given"].documents,
        kept=amounts["kept"].documents,
        dropped={name: amount.documents for name, amount in amounts.items() if name not in ("given", "kept")},
    )
    with atomic_write(folder / CLEANING_FILE) as stream:
        stream.write(report.model_dump_json(indent=1).encode() + b"\n")
    return report


def _amounts(filtered: list[TaskRecord], sifted: list[TaskRecord]) -> dict[str, Amount]:
    dropped: dict[str, Amount] = {}
    for record in (*filtered, *sifted):
        for reason, amount in record.dropped.items():
            dropped[reason] = dropped.get(reason, Amount()) + amount
    return {
        "given": sum((record.given for record in filtered), Amount()),
        **dropped,
        "kept": sum((record.kept for record in sifted), Amount()),
    }


def _text_files(sifted: list[TaskRecord]) -> dict[str, FileRecord]:
    return {
        name: file for record in sifted for name, file in record.files.items() if name.startswith("text/")
    }


def _set_reports(config: CleaningConfig, sifted: list[TaskRecord]) -> dict[str, SetReport]:
    evaluation = EvaluationTexts(config.decontaminate)
    return {
        name: SetReport(
            examples=examples,
            too_short=evaluation.too_short[name],
            found=len({number for record in sifted for number in record.found[name]}),
            documents=sum(record.contaminated[name] for record in sifted),
        )
        for name, examples in evaluation.examples.items()
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
