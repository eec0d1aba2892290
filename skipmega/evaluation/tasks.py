"""Local lm-eval tasks, made without network: from held-out text, and from jsonl benchmark files.

A task is a YAML file that names its data by absolute path (lm-eval resolves a relative one against the
working directory). After moving the data, write the tasks again.
"""

import difflib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from skipmega.data.files import atomic_write
from skipmega.errors import ConfigError, DataError

Record = dict[str, Any]

NUM_CHOICES = 4
_ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_NORMED_ACCURACY = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


def write_continuation_task(
    documents: Sequence[str],
    out_dir: str | Path,
    name: str = "continuation",
    *,
    max_questions: int = 200,
    num_examples: int = 20,
    context_chars: int = 600,
    continuation_chars: int = 120,
    rolling_chars: int = 4000,
    seed: int = 1234,
) -> list[str]:
    """Make two tasks of held-out text.

    ``NAME`` is multiple choice: the beginning of a document, and which of four chunks of text comes next;
    the other three continue other documents at the same place. Guessing scores 0.25. Its few-shot
    examples are questions of their own, from other documents.
    ``NAME_bits`` is the bits per byte (and byte and word perplexity) of the beginnings of the documents
    that the questions are from.

    Contexts and continuations end at the end of a word and are at most as long as asked, at least half.
    A document that is too short for that, or repeats an earlier one's text, is left out. The same
    arguments give the same files.

    Args:
        documents: text that the model was not trained on.
        out_dir: folder for ``NAME.yaml``, ``NAME_bits.yaml`` and three jsonl files.
        max_questions: at most so many questions are made.
        num_examples: documents set aside for few-shot examples, at least four.
        context_chars: length of a context, in characters.
        continuation_chars: length of a choice, in characters.
        rolling_chars: length of a text of ``NAME_bits``, in characters.
        seed: of the choice of documents and of the wrong answers.

    Returns:
        The names of the two tasks.

    Raises:
        ConfigError: a name or number that cannot be used.
        DataError: too few usable documents.
    """
    _check_task_name(name)
    if num_examples < NUM_CHOICES or max_questions < NUM_CHOICES:
        raise ConfigError(
            f"num_examples={num_examples} and max_questions={max_questions}: both must be at least "
            f"{NUM_CHOICES}, the wrong answers come from the other documents"
        )
    passages = _passages(documents, context_chars, continuation_chars)
    if len(passages) < num_examples + NUM_CHOICES:
        raise DataError(
            f"{len(passages)} of {len(documents)} documents are long and distinct enough for a question, "
            f"{num_examples + NUM_CHOICES} are needed: give more or longer ones, or lower context_chars="
            f"{context_chars}, continuation_chars={continuation_chars} or num_examples={num_examples}"
        )
    generator = random.Random(seed)
    generator.shuffle(passages)
    examples = passages[:num_examples]
    questions = passages[num_examples : num_examples + max_questions]
    out_dir = Path(out_dir).resolve()
    files = {split: out_dir / f"{name}.{split}.jsonl" for split in ("train", "validation", "rolling")}
    _write_jsonl(files["train"], _questions(examples, generator))
    _write_jsonl(files["validation"], _questions(questions, generator))
    _write_jsonl(files["rolling"], [{"text": passage.document[:rolling_chars]} for passage in questions])
    bits = f"{name}_bits"
    _write_yaml(out_dir / f"{name}.yaml", _continuation_yaml(name, files))
    _write_yaml(out_dir / f"{bits}.yaml", _rolling_yaml(bits, files["rolling"]))
    return [name, bits]


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
        _check_task_name(task)
        _write_yaml(Path(out_dir) / f"{task}.yaml", _benchmark_yaml(task, found[stem]))
        tasks.append(task)
    return tasks


@dataclass(frozen=True)
class _Passage:
    """The beginning of a document, cut in two."""

    context: str
    continuation: str
    document: str


def _passages(documents: Sequence[str], context_chars: int, continuation_chars: int) -> list[_Passage]:
    """One passage of each document that is long enough and repeats no earlier one."""
    passages = []
    seen: set[str] = set()
    for document in documents:
        text = document.strip()
        cut = _word_end(text, context_chars)
        end = _word_end(text, cut + continuation_chars)
        context, continuation = text[:cut], text[cut:end]
        long_enough = 2 * cut >= context_chars and 2 * len(continuation) >= continuation_chars
        if long_enough and seen.isdisjoint((context, continuation)):
            seen.update((context, continuation))
            passages.append(_Passage(context, continuation, text))
    return passages


def _word_end(text: str, limit: int) -> int:
    """The last place at or before ``limit`` where a word ends and white space follows; 0 if none."""
    ends = [match.start() for match in _WORD_END.finditer(text, 0, limit + 1)]
    return ends[-1] if ends else 0


def _questions(passages: Sequence[_Passage], generator: random.Random) -> list[Record]:
    records = []
    for index, passage in enumerate(passages):
        others = [*passages[:index], *passages[index + 1 :]]
        choices = [other.continuation for other in generator.sample(others, NUM_CHOICES - 1)]
        gold = generator.randrange(NUM_CHOICES)
        choices.insert(gold, passage.continuation)
        records.append({"context": passage.context, "choices": choices, "gold": gold})
    return records


def _continuation_yaml(name: str, files: dict[str, Path]) -> Record:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(files[split]) for split in ("train", "validation")}},
        "training_split": "train",
        "validation_split": "validation",
        "fewshot_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [_ACCURACY, _NORMED_ACCURACY],
        "metadata": {"version": 1.0},
    }


def _rolling_yaml(name: str, path: Path) -> Record:
    aggregations = {
        "bits_per_byte": "bits_per_byte",
        "byte_perplexity": "weighted_perplexity",
        "word_perplexity": "weighted_perplexity",
    }
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path)}},
        "validation_split": "validation",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in aggregations.items()
        ],
        "metadata": {"version": 1.0},
    }


def _benchmark_yaml(task: str, path: Path) -> Record:
    records = _read_jsonl(path)
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
        "metric_list": [_ACCURACY, _NORMED_ACCURACY],
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
        "metric_list": [_ACCURACY],
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
            _ACCURACY,
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


def _check_task_name(name: str) -> None:
    if not _TASK_NAME.fullmatch(name):
        raise ConfigError(f"task name {name!r}: use letters, digits, dots, dashes and underscores")


def _read_jsonl(path: Path) -> list[Record]:
    """The records of a jsonl file, one or more."""
    records = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number} is not a JSON object")
            records.append(record)
    if not records:
        raise DataError(f"{path} is empty")
    return records


def _write_jsonl(path: Path, records: Sequence[Record]) -> None:
    with atomic_write(path) as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _write_yaml(path: Path, values: Record) -> None:
    with atomic_write(path) as stream:
        stream.write(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())
