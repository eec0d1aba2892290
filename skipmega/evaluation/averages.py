"""Averages over a suite's families, which no missing set leaves silently."""

import math
from collections.abc import Sequence

from skipmega.evaluation.results import Average, TaskResult
from skipmega.evaluation.suite import FAMILIES, Suite


def average_families(suite: Suite, results: Sequence[TaskResult]) -> list[Average]:
    """The average of each family of ``suite``."""
    found = {result.name: result for result in results}
    averages = []
    for family in FAMILIES:
        members = {name: task for name, task in suite.tasks.items() if task.family == family}
        if not members:
            continue
        scores = [
            metric
            for name, task in members.items()
            if (result := found.get(suite.task_name(name)))
            for metric in result.metrics
            if metric.name == task.metric
        ]
        errors = [score.stderr for score in scores if score.stderr is not None]
        count = len(scores)
        whole = count > 0 and len(errors) == count
        averages.append(
            Average(
                suite=suite.name,
                family=family,
                value=sum(score.value for score in scores) / count if count else None,
                stderr=math.hypot(*errors) / count if whole else None,
                present=count,
                missing=[name for name in members if suite.task_name(name) not in found],
            )
        )
    return averages
