"""Who is how many times as fast, from evaluations whose seconds are told."""

from collections.abc import Callable

import pytest

from skipmega.evaluation import EvaluationResult, MetricResult, TaskResult
from skipmega.experiments.evaluation_speed import REFERENCE, measure_evaluation


def evaluator(seconds: list[float], score: float, asked: list[int | None]) -> Callable[..., EvaluationResult]:
    """Tells a short first evaluation, then those of ``seconds``."""
    left = [99.0, *seconds]

    def evaluate(limit: int | None) -> EvaluationResult:
        asked.append(limit)
        task = TaskResult("t", "1", 1, 20, 30, [MetricResult("acc", "none", score, None, True)])
        return EvaluationResult("m", [task], [], {}, 3, [], {}, {}, left.pop(0), "now")

    return evaluate


def test_medians_are_compared_with_the_reference() -> None:
    asked: list[int | None] = []
    found = measure_evaluation(
        {"ours": evaluator([2.0, 9.0, 4.0], 0.5, asked), REFERENCE: evaluator([8.0, 7.0, 12.0], 0.4, asked)},
        limit=20,
        repeats=3,
    )
    assert asked == [2, 2, *[20] * 6], "a short turn each, which does not count"
    assert found.seconds == {"ours": [2.0, 9.0, 4.0], REFERENCE: [8.0, 7.0, 12.0]}
    assert found.ratios == {"ours": 2.0, REFERENCE: 1.0}
    assert found.difference == pytest.approx(0.25)
    assert "| ours | 4.0 (2.0-9.0) | 2.00 |" in found.table()
    assert "20 documents, 3 requests longer" in found.table()
