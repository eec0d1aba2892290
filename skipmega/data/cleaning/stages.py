"""The three stages of a cleaning. A task of one reads what all tasks of the stage before it have written.

- ``filter``, by shards of the input: documents that pass the rules, and their keys;
- ``match``, by partitions of the keys: documents that share a key with one before them;
- ``sift``, by shards: documents without those, and without those that hold evaluation sets.

What a task writes is whole or not there, and is the same whenever and wherever it runs.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipmega.data.cleaning.config import CleaningConfig
from skipmega.data.cleaning.contamination import EvaluationTexts, fingerprint
from skipmega.data.cleaning.keys import EXACT, KeyMaker, KeyWriter, read_keys
from skipmega.data.cleaning.records import (
    StageName,
    Tally,
    TaskRecord,
    check_content,
    check_made_of,
    code_hash,
    need_record,
    read_record,
    record_files,
    write_record,
)
from skipmega.data.cleaning.rules import Rules
from skipmega.data.cleaning.texts import read_texts, write_texts
from skipmega.data.corpora.readers import Corpus
from skipmega.data.corpora.splitting import check_shards, split_files
from skipmega.data.files import atomic_write
from skipmega.data.pairs.manifest import SourceRecord
from skipmega.errors import DataError

STAGES: tuple[StageName, ...] = ("filter", "match", "sift")
_DUPLICATE = np.dtype([("shard", "<u4"), ("document", "<u4"), ("exact", "?")])


def count_tasks(config: CleaningConfig, stage: StageName) -> int:
    """How many tasks a stage has, numbered from 0."""
    return config.deduplicate.partitions if stage == "match" else config.shards


def check_cleaning(config: CleaningConfig) -> None:
    """Refuse before any work what the work would refuse.

    Raises:
        DataError: the output lies in the input, which cannot be cut into the shards, or an evaluation set
            cannot be read.
        ConfigError: a rule that cannot be.
    """
    output = Path(config.output).resolve()
    for path in config.input:
        if output.is_relative_to(Path(path).resolve()):
            raise DataError(f"output={config.output} lies in input {path} and would be read too: move it")
    check_shards(Corpus(config.input), config.shards)
    Rules(config.filter)
    EvaluationTexts(config.decontaminate)


def run_task(config: CleaningConfig, stage: StageName, number: int) -> TaskRecord:
    """Do a task; nothing if that was done before.

    Raises:
        DataError: there is no such task, one that it builds on is not done, what is there was made of
            something else, or something cannot be read.
        ConfigError: a rule that cannot be.
    """
    tasks = count_tasks(config, stage)
    if not 0 <= number < tasks:
        raise DataError(f"task {number} of stage {stage}: there are {tasks}, numbered from 0")
    return {"filter": _filter, "match": _match, "sift": _sift}[stage](config, number)


def _finish(
    folder: Path, stage: StageName, number: int, made_of: dict[str, str], do: Callable[[], dict[str, Any]]
) -> TaskRecord:
    done = read_record(folder, stage, number)
    if done is not None:
        check_made_of(folder, done, made_of)
        return done
    record = TaskRecord(stage=stage, number=number, made_of=made_of, code=code_hash(), **do())
    write_record(folder, record)
    return record


def _filter(config: CleaningConfig, shard: int) -> TaskRecord:
    folder = Path(config.output)
    options: dict[str, Any] = {"text_field": config.text_field, "skip_bad": config.skip_bad}
    files = split_files(Corpus(config.input, **options), config.shards)[shard]
    sources = tuple(SourceRecord(path=str(file.path), bytes=file.size) for file in files)
    made_of = {
        "input": _describe(sources),
        "text_field": config.text_field,
        "filter": config.filter.model_dump_json(),
        "deduplicate": config.deduplicate.model_dump_json(),
    }

    def do() -> dict[str, Any]:
        corpus = Corpus([file.path for file in files], **options) if files else None
        rules, maker, kept, given = Rules(config.filter), KeyMaker(config.deduplicate), 0, Tally()
        written = [
            _part(folder, "filtered", shard),
            _part(folder, "keys", shard),
            _dropped(folder, "filter", shard),
        ]
        with (
            write_texts(written[0]) as texts,
            atomic_write(written[1]) as stream,
            write_texts(written[2]) as dropped,
        ):
            keys = KeyWriter(stream, config.deduplicate.partitions)
            for document in corpus or ():
                text, reason = rules.judge(document) if document.text.strip() else ("", "empty")
                given.count(len(document.text.encode()), reason)
                if reason is not None:
                    dropped.add(**{"from": document.where, "reason": reason})
                    continue
                texts.add(**{"text": text, "from": document.where})
                keys.add(kept, maker.keys(text))
                kept += 1
            keys.flush()
        return {
            **_amounts(given),
            "files": record_files(folder, written),
            "sources": sources,
            "bad_records": corpus.bad_records if corpus else 0,
        }

    return _finish(folder, "filter", shard, made_of, do)


def _match(config: CleaningConfig, partition: int) -> TaskRecord:
    folder, partitions = Path(config.output), config.deduplicate.partitions
    made_of = {"keys": _checksums(config, "filter", "keys")}

    def do() -> dict[str, Any]:
        written = _part(folder, "duplicates", partition)
        keys = [
            read_keys(_part(folder, "keys", shard), partition, partitions) for shard in range(config.shards)
        ]
        with atomic_write(written) as stream:
            stream.write(_later_ones(keys).tobytes())
        return {"files": record_files(folder, [written])}

    return _finish(folder, "match", partition, made_of, do)


def _later_ones(keys: list[NDArray[Any]]) -> NDArray[Any]:
    """The documents that have a key which one before them has, by shard and number.

    That is all but the first of every group, and needs no groups: of two documents that stay no key is
    shared, and each that goes shares one with an earlier.
    """
    rows = np.concatenate(keys)
    shards = np.repeat(np.arange(len(keys), dtype=np.uint32), [len(part) for part in keys])
    order = np.argsort(rows["key"], kind="stable")
    later = order[1:][rows["key"][order[1:]] == rows["key"][order[:-1]]]
    found = np.empty(len(later), _DUPLICATE)
    found["shard"], found["document"] = shards[later], rows["document"][later]
    found["exact"] = rows["key"][later] & np.uint64(1) == EXACT
    return np.unique(found)


def _sift(config: CleaningConfig, shard: int) -> TaskRecord:
    folder = Path(config.output)
    before = need_record(folder, "filter", shard)
    made_of = {
        "filtered": before.files[f"filtered/{_name('filtered', shard)}"].sha256,
        "duplicates": _checksums(config, "match", "duplicates"),
        "decontaminate": fingerprint(config.decontaminate),
    }

    def do() -> dict[str, Any]:
        check_content(folder, before)
        evaluation, given = EvaluationTexts(config.decontaminate), Tally()
        duplicates = _duplicates_of(config, shard)
        found: dict[str, set[int]] = {name: set() for name in evaluation.examples}
        contaminated = dict.fromkeys(evaluation.examples, 0)
        written = [_part(folder, "text", shard), _dropped(folder, "sift", shard)]
        with write_texts(written[0]) as texts, write_texts(written[1]) as dropped:
            filtered = read_texts(_part(folder, "filtered", shard), before.kept.documents)
            for number, document in enumerate(filtered):
                reason = duplicates.get(number)
                if reason is None and (examples := evaluation.search(document.text)):
                    reason = f"evaluation set: {', '.join(examples)}"
                    for name, numbers in examples.items():
                        found[name].update(numbers)
                        contaminated[name] += 1
                given.count(len(document.text.encode()), reason)
                if reason is None:
                    texts.add(**{"text": document.text, "from": document.where})
                else:
                    dropped.add(**{"from": document.where, "reason": reason})
        return {
            **_amounts(given),
            "files": record_files(folder, written),
            "found": {name: sorted(numbers) for name, numbers in found.items()},
            "contaminated": contaminated,
        }

    return _finish(folder, "sift", shard, made_of, do)


def _duplicates_of(config: CleaningConfig, shard: int) -> dict[int, str]:
    folder, reasons = Path(config.output), dict[int, str]()
    for partition in range(config.deduplicate.partitions):
        check_content(folder, need_record(folder, "match", partition))
        rows = np.fromfile(_part(folder, "duplicates", partition), _DUPLICATE)
        for document, exact in rows[rows["shard"] == shard][["document", "exact"]].tolist():
            if exact or document not in reasons:
                reasons[document] = "duplicate: exact" if exact else "duplicate: near"
    return reasons


def _describe(sources: tuple[SourceRecord, ...]) -> str:
    digest = hashlib.sha256(repr([(source.path, source.bytes) for source in sources]).encode())
    return (
        f"{len(sources)} files of {sum(source.bytes for source in sources)} bytes ({digest.hexdigest()[:12]})"
    )


def _checksums(config: CleaningConfig, stage: StageName, kind: str) -> str:
    """One checksum over the files of that kind that all tasks of a stage have written."""
    digest = hashlib.sha256()
    for number in range(count_tasks(config, stage)):
        record = need_record(Path(config.output), stage, number)
        digest.update(record.files[f"{kind}/{_name(kind, number)}"].sha256.encode())
    return digest.hexdigest()


def _amounts(tally: Tally) -> dict[str, Any]:
    return {"given": sum(tally.dropped.values(), tally.kept), "kept": tally.kept, "dropped": tally.dropped}


def _name(kind: str, number: int) -> str:
    return f"{number:05d}{'.jsonl.zst' if kind in ('filtered', 'text') else ''}"


def _part(folder: Path, kind: str, number: int) -> Path:
    return folder / kind / _name(kind, number)


def _dropped(folder: Path, stage: StageName, number: int) -> Path:
    return folder / "dropped" / stage / f"{number:05d}.jsonl.zst"
