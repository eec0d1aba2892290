"""SQuAD v2's scores: exact match and token F1 against the best of the accepted answers.

The word "unanswerable", which the example teaches, is taken for having no answer.
"""

from collections.abc import Sequence
from typing import Any

from transformers.data.metrics.squad_metrics import compute_exact, compute_f1

NO_ANSWER = "unanswerable"


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """``exact`` and ``f1``, each 0 to 1, of what was generated for a question."""
    prediction = results[0].strip()
    if prediction.lower().rstrip(".") == NO_ANSWER:
        prediction = ""
    accepted = doc["answers"]["text"] or [""]
    return {
        "exact": float(max(compute_exact(answer, prediction) for answer in accepted)),
        "f1": float(max(compute_f1(answer, prediction) for answer in accepted)),
    }
