"""Which documents hold what evaluation sets ask."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipmega.data.cleaning.config import DecontaminateConfig, EvaluationSet
from skipmega.data.cleaning.words import hash_runs, hash_words, normalized
from skipmega.errors import ConfigError, DataError


@dataclass(frozen=True)
class _Runs:
    """Hashes of runs of one length out of one set, ascending, and the example that each is (first) of."""

    hashes: NDArray[np.uint64]
    examples: NDArray[np.int64]

    def examples_of(self, runs: NDArray[np.uint64]) -> list[int]:
        places = _places(self.hashes, runs)
        return self.examples[places[places >= 0]].tolist()


class EvaluationTexts:
    """The runs of words of all evaluation sets.

    Attributes:
        examples: of each set, how many it has.
        too_short: of each set, how many have no text of ``shortest`` words or more; they are not
            searched for.

    Raises:
        DataError: a set cannot be read, or a line has not the fields.
        ConfigError: ``shortest`` is greater than ``ngram``.
    """

    def __init__(self, config: DecontaminateConfig) -> None:
        if config.shortest > config.ngram:
            raise ConfigError(
                f"decontaminate.shortest={config.shortest} must be at most ngram={config.ngram}"
            )
        self.examples: dict[str, int] = {}
        self.too_short: dict[str, int] = {}
        self._sets: dict[str, dict[int, _Runs]] = {}
        for name, evaluation in config.sets.items():
            self._sets[name] = self._read(name, evaluation, config)
        lengths = {length for runs in self._sets.values() for length in runs}
        self._all = {
            length: np.unique(
                np.concatenate([runs[length].hashes for runs in self._sets.values() if length in runs])
            )
            for length in sorted(lengths)
        }

    def search(self, text: str) -> dict[str, list[int]]:
        """The examples, from 0, of which a document has a run of words, by set; at least one of those that
        share a run is among them."""
        found: dict[str, set[int]] = {}
        words = hash_words(normalized(text)) if self._all else np.empty(0, np.uint32)
        for length, known in self._all.items():
            runs = hash_runs(words, length)
            shared = runs[_places(known, runs) >= 0]
            if len(shared):
                for name, sets in self._sets.items():
                    if hits := sets[length].examples_of(shared) if length in sets else []:
                        found.setdefault(name, set()).update(hits)
        return {name: sorted(numbers) for name, numbers in found.items()}

    def _read(self, name: str, evaluation: EvaluationSet, config: DecontaminateConfig) -> dict[int, _Runs]:
        collected: dict[int, list[tuple[NDArray[np.uint64], int]]] = {}
        self.examples[name] = self.too_short[name] = 0
        for number, texts in enumerate(_texts(name, evaluation)):
            self.examples[name] += 1
            searched = False
            for words in (hash_words(normalized(text)) for text in texts):
                length = min(len(words), config.ngram)
                if length >= config.shortest:
                    collected.setdefault(length, []).append((hash_runs(words, length), number))
                    searched = True
            self.too_short[name] += not searched
        return {length: _runs(parts) for length, parts in collected.items()}


def _runs(parts: list[tuple[NDArray[np.uint64], int]]) -> _Runs:
    hashes = np.concatenate([runs for runs, _ in parts])
    examples = np.concatenate([np.full(len(runs), number) for runs, number in parts])
    unique, first = np.unique(hashes, return_index=True)
    return _Runs(unique, examples[first])


def _places(known: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each of ``wanted`` is in ``known``, -1 where it is not."""
    places = np.searchsorted(known, wanted)
    inside = np.minimum(places, len(known) - 1)
    return np.where(known[inside] == wanted, inside, -1)


def _texts(name: str, evaluation: EvaluationSet) -> Iterator[list[str]]:
    field = f"decontaminate.sets.{name}"
    try:
        lines = Path(evaluation.path).read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{field}: cannot read {evaluation.path}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        where = f"{field}: {evaluation.path}:{number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not a line of JSON ({error})") from None
        yield _texts_of(values, evaluation, where)


def _texts_of(values: Any, evaluation: EvaluationSet, where: str) -> list[str]:
    whole, texts = [], []
    for field in evaluation.fields:
        value = values.get(field) if isinstance(values, dict) else None
        if isinstance(value, str):
            whole.append(value)
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            texts.extend(value)
        else:
            raise DataError(
                f"{where}: field {field!r} holds {type(value).__name__}, not text or a list of it"
            )
    texts.append(" ".join(whole))
    for ignored in evaluation.ignore:
        texts = [text.replace(ignored, " ") for text in texts]
    return texts


def fingerprint(config: DecontaminateConfig) -> str:
    """SHA-256 of what would be searched for.

    Raises:
        DataError: a set cannot be read.
    """
    digest = hashlib.sha256(config.model_dump_json().encode())
    for name, evaluation in config.sets.items():
        try:
            digest.update(Path(evaluation.path).read_bytes())
        except OSError as error:
            raise DataError(
                f"decontaminate.sets.{name}: cannot read {evaluation.path}: {error.strerror}"
            ) from None
    return digest.hexdigest()
