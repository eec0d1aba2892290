"""lm-eval tasks of jsonl benchmark files whose records hold finished questions."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from skipmega.errors import ConfigError, DataError
from skipmega.evaluation.records import (
    ACCURACY,
    NORMED_ACCURACY,
    Record,
    check_task_name,
    read_jsonl,
    write_yaml,
)


def write_benchmark_tasks(
    source_dir: str | Path, out_dir: str | Path, names: Sequence[str] | None = None
) -> list[str]:
    """Make lm-eval tasks ``local_STEM`` of jsonl benchmark files, which stay where they are.

    The fields of a file's records decide its kind:

    - ``query, choices, gold``: multiple choice (acc, acc_norm). When every query begins with "Question:"
      or "Passage:", it is followed by a line "Answer:".
    - ``context_options, continuation, gold``: which context makes the continuation likeliest, scored on
      the continuation alone (acc).
    - ``context, answer, aliases``: generation of a line, right if it equals the answer or an alias but
      for case and punctuation (exact_match); at most 32 tokens.
    - ``context, continuation``: the likelihood of a continuation after a space, right if greedy decoding
      gives it (acc, perplexity).

    Such a file has one split. Few-shot examples come from the evaluated questions, never the one that is
    being asked; compare scores only with others made this way.

    Args:
        source_dir: folder of ``STEM.jsonl`` files.
        out_dir: folder for the YAML files.
        names: stems, or None for every jsonl file.

    Returns:
        The names of the tasks, sorted.

    Raises:
        ConfigError: no such file.
        DataError: a record that is none of the kinds, or not of its file's kind.
    """
    source_dir = Path(source_dir).resolve()
    found = {path.stem: path for path in sorted(source_dir.glob("*.jsonl"))}
    if not found:
        raise ConfigError(f"{source_dir} is not a folder with jsonl files")
    for name in names or ():
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"{source_dir} has no {name}.jsonl; {hint}there are {', '.join(found)}")
    tasks = []
    for stem in sorted(set(names if names is not None else found)):
        task = f"local_{stem}"
        check_task_name(task)
        write_yaml(Path(out_dir) / f"{task}.yaml", benchmark_yaml(task, found[stem]))
        tasks.append(task)
    return tasks


def benchmark_yaml(task: str, path: Path) -> Record:
    """The YAML of a task on one file; kinds and errors as in :func:`write_benchmark_tasks`."""
    records = read_jsonl(path)
    kind = _kind_of(path, records[0])
    for number, record in enumerate(records, start=1):
        if problem := kind.problem(record):
            raise DataError(f"{path}, line {number}: {problem}")
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        # lm-eval keeps the question out of its own examples only if the *test* split is the pool.
        "test_split": "test",
        "fewshot_split": "test",
        **kind.template(records),
        "metadata": {"version": 1.0},
    }


@dataclass(frozen=True)
class _Kind:
    """A benchmark format: its fields, what is wrong with a record (or None), its part of the YAML."""

    fields: frozenset[str]
    problem: Callable[[Record], str | None]
    template: Callable[[list[Record]], Record]


def _kind_of(path: Path, record: Record) -> _Kind:
    for kind in _KINDS:
        if kind.fields <= set(record):
            return kind
    formats = "; ".join(", ".join(sorted(kind.fields)) for kind in _KINDS)
    raise DataError(f"{path} has records of {', '.join(sorted(record))}; known are: {formats}")


def _choice_problem(record: Record) -> str | None:
    return _text_problem(record, "query") or _gold_problem(record, "choices")


def _choice_template(records: list[Record]) -> Record:
    asks = all(record["query"].startswith(("Question:", "Passage:")) for record in records)
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query | trim}}" + ("\nAnswer:" if asks else ""),
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [ACCURACY, NORMED_ACCURACY],
    }


def _partial_problem(record: Record) -> str | None:
    return _text_problem(record, "continuation") or _gold_problem(record, "context_options")


def _partial_template(records: list[Record]) -> Record:
    # An integer for doc_to_text is how lm-eval is told that the choices are contexts.
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
        "metric_list": [ACCURACY],
    }


def _answer_problem(record: Record) -> str | None:
    if not _are_texts(record.get("aliases")):
        return f"aliases must be a list of texts, found {record.get('aliases')!r}"
    return _text_problem(record, "context") or _text_problem(record, "answer")


def _answer_template(records: list[Record]) -> Record:
    return {
        "output_type": "generate_until",
        "doc_to_text": "{{context | trim}}",
        "doc_to_target": "{{[answer] + aliases}}",
        "generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 32},
        "filter_list": [
            {
                "name": "remove_whitespace",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": True,
            }
        ],
    }


def _continuation_problem(record: Record) -> str | None:
    return _text_problem(record, "context") or _text_problem(record, "continuation")


def _continuation_template(records: list[Record]) -> Record:
    return {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context | trim}}",
        "doc_to_target": "{{' ' + (continuation | trim)}}",
        "target_delimiter": "",
        "metric_list": [
            ACCURACY,
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    }


_KINDS = (
    _Kind(frozenset({"query", "choices", "gold"}), _choice_problem, _choice_template),
    _Kind(frozenset({"context_options", "continuation", "gold"}), _partial_problem, _partial_template),
    _Kind(frozenset({"context", "answer", "aliases"}), _answer_problem, _answer_template),
    _Kind(frozenset({"context", "continuation"}), _continuation_problem, _continuation_template),
)


def _text_problem(record: Record, field: str) -> str | None:
    value = record.get(field)
    if isinstance(value, str) and value.strip():
        return None
    return f"{field} must be a text that is not empty, found {value!r}"


def _gold_problem(record: Record, field: str) -> str | None:
    choices, gold = record.get(field), record.get("gold")
    if not _are_texts(choices) or len(choices) < 2:
        return f"{field} must be a list of two or more texts, found {choices!r}"
    if type(gold) is not int or not 0 <= gold < len(choices):
        return (
            f"gold must be a number from 0 to {len(choices) - 1}, the place of the right one, found {gold!r}"
        )
    return None


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)
