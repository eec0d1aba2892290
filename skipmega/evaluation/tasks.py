"""A local lm-eval task of held-out text, made without network.

A task is a YAML file that names its data by absolute path (lm-eval resolves a relative one against the
working directory). After moving the data, write the tasks again.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from skipmega.errors import ConfigError, DataError
from skipmega.evaluation.records import (
    ACCURACY,
    NORMED_ACCURACY,
    Record,
    check_task_name,
    write_jsonl,
    write_yaml,
)

NUM_CHOICES = 4
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
    check_task_name(name)
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
    write_jsonl(files["train"], _questions(examples, generator))
    write_jsonl(files["validation"], _questions(questions, generator))
    write_jsonl(files["rolling"], [{"text": passage.document[:rolling_chars]} for passage in questions])
    bits = f"{name}_bits"
    write_yaml(out_dir / f"{name}.yaml", _continuation_yaml(name, files))
    write_yaml(out_dir / f"{bits}.yaml", _rolling_yaml(bits, files["rolling"]))
    return [name, bits]


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
        "metric_list": [ACCURACY, NORMED_ACCURACY],
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
