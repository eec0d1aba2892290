"""Seconds of evaluation: skipmega's reading of a checkpoint and of its export, and lm-eval's own."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from skipmega.evaluation import EvaluationResult

REFERENCE = "lm-eval's hf"
_WARM_UP_DOCUMENTS = 2


@dataclass(frozen=True)
class EvaluationTimes:
    """Seconds of whole evaluations, questions and standard errors included, by who evaluated.

    ``ratios`` are medians of the reference over medians; ``difference`` is the largest relative one between a
    score and the reference's.
    """

    seconds: dict[str, list[float]]
    ratios: dict[str, float]
    difference: float
    scores: dict[str, float]
    documents: int
    truncated: int | None

    def table(self) -> str:
        """A Markdown table."""
        lines = ["| | seconds, median (range) | times as fast |", "|---|---|---|"]
        for name, seconds in self.seconds.items():
            spread = f"{min(seconds):.1f}-{max(seconds):.1f}"
            lines.append(
                f"| {name} | {statistics.median(seconds):.1f} ({spread}) | {self.ratios[name]:.2f} |"
            )
        lines += [
            "",
            f"{self.documents} documents, {self.truncated} requests longer than the model; largest relative "
            f"difference of a score {self.difference:.1e}.",
        ]
        return "\n".join(lines)

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def measure_evaluation(
    evaluators: Mapping[str, Callable[[int | None], EvaluationResult]], limit: int | None, repeats: int
) -> EvaluationTimes:
    """Evaluate with each of ``evaluators``, in turns, after a short one that does not count.

    Args:
        evaluators: by name, REFERENCE among them; each is given the number of documents of a task.
        limit: that number; None for all.
        repeats: so many turns.
    """
    for evaluate in evaluators.values():
        evaluate(_WARM_UP_DOCUMENTS)
    results: dict[str, list[EvaluationResult]] = {name: [] for name in evaluators}
    for _ in range(repeats):
        for name, evaluate in evaluators.items():
            results[name].append(evaluate(limit))
    seconds = {name: [result.seconds for result in each] for name, each in results.items()}
    scores = {name: _scores(each[0]) for name, each in results.items()}
    reference = statistics.median(seconds[REFERENCE])
    first = next(iter(results.values()))[0]
    return EvaluationTimes(
        seconds=seconds,
        ratios={name: reference / statistics.median(each) for name, each in seconds.items()},
        difference=max(_difference(found, scores[REFERENCE]) for found in scores.values()),
        scores=scores[REFERENCE],
        documents=sum(task.num_samples or 0 for task in first.tasks),
        truncated=first.truncated,
    )


def _scores(result: EvaluationResult) -> dict[str, float]:
    return {f"{task.name}/{metric.name}": metric.value for task in result.tasks for metric in task.metrics}


def _difference(found: Mapping[str, float], expected: Mapping[str, float]) -> float:
    """The largest relative difference of two results with the same scores."""
    assert found.keys() == expected.keys()
    return max(abs(found[key] - value) / max(abs(value), 1e-12) for key, value in expected.items())
