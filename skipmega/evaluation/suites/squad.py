"""SQuAD's scoring of short answers, for the tasks whose own needs the network (SQuAD v2) or a module that
transformers no longer has (ReCoRD).

Texts are compared in lower case, without punctuation and articles. For SQuAD v2 the word "unanswerable",
which the example teaches, is taken for having no answer.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

NO_ANSWER = "unanswerable"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_answer(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """``exact`` and ``f1``, each 0 to 1, of what was generated for a question of SQuAD v2."""
    prediction = results[0].strip()
    if words(prediction) == [NO_ANSWER]:
        prediction = ""
    accepted = doc["answers"]["text"] or [""]
    return {"exact": best(exact, prediction, accepted), "f1": best(token_f1, prediction, accepted)}


def score_entity(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """``em`` and ``f1``, each 0 to 1, of the likeliest entity of a ReCoRD query."""
    likeliest = max(range(len(results)), key=lambda place: results[place][0])
    entity = entities(doc)[likeliest]
    return {"em": best(exact, entity, doc["answers"]), "f1": best(token_f1, entity, doc["answers"])}


def entities(doc: dict[str, Any]) -> list[str]:
    """The distinct entities of a ReCoRD passage, in order."""
    return sorted(set(doc["entities"]))


def passage(doc: dict[str, Any]) -> str:
    """A ReCoRD passage with its highlights as a list, which the query continues."""
    text, *highlights = doc["passage"].strip().split("\n@highlight\n")
    return f"{text}\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)


def statements(doc: dict[str, Any]) -> list[str]:
    """The query with each entity in its place."""
    return [f"  - {doc['query']}".replace("@placeholder", entity) for entity in entities(doc)]


def true_statement(doc: dict[str, Any]) -> str:
    """The query with the first right entity in its place."""
    return f"  - {doc['query']}".replace("@placeholder", min(doc["answers"]))


def words(text: str) -> list[str]:
    """What is compared of a text."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact(prediction: str, answer: str) -> float:
    """1 if the words are the same, else 0."""
    return float(words(prediction) == words(answer))


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words; without words on a side, whether both have none."""
    found, wanted = words(prediction), words(answer)
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def best(score: Any, prediction: str, accepted: Sequence[str]) -> float:
    """The best ``score`` among the accepted answers."""
    return max(score(prediction, answer) for answer in accepted)
