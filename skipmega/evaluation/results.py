"""What an evaluation found: plain values, a printed table, a JSON file."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skipmega.data.files import atomic_write
from skipmega.evaluation.effort import Effort

_HEADERS = ("task", "version", "shots", "samples", "metric", "", "value", "stderr")
_NUMBER_COLUMNS = {2, 3, 6, 7}


@dataclass(frozen=True)
class MetricResult:
    """One metric of one task.

    ``filter`` names lm-eval's post-processing ("none" for likelihoods). ``stderr`` is the standard error
    over the samples, None where lm-eval gives none (word, byte perplexity and bits per byte).
    """

    name: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskResult:
    """All metrics of one task or group. ``num_samples`` is what was evaluated of ``num_available``; both
    are None for a group."""

    name: str
    version: str
    num_fewshot: int | None
    num_samples: int | None
    num_available: int | None
    metrics: list[MetricResult]


@dataclass(frozen=True)
class Average:
    """Mean over a family's tasks, each counting the same whatever its size.

    ``value`` and ``stderr`` are of the tasks that were evaluated, ``present`` in number; ``missing`` names
    the others. Only of a ``complete`` family is the value comparable with another model's.
    """

    suite: str
    family: str
    value: float | None
    stderr: float | None
    present: int
    missing: list[str]

    @property
    def complete(self) -> bool:
        """Whether no task is missing."""
        return not self.missing

    def describe(self) -> str:
        """One line for a report."""
        of = f"{self.present} of {self.present + len(self.missing)} tasks"
        if self.value is None:
            return f"{self.suite}, {self.family}: none of its tasks has data"
        error = "" if self.stderr is None else f" +- {self.stderr:.4f}"
        if self.complete:
            return f"{self.suite}, {self.family}: {self.value:.4f}{error} ({of})"
        return (
            f"{self.suite}, {self.family}: no average; {self.value:.4f}{error} over {of}, without "
            f"{', '.join(self.missing)}"
        )


@dataclass(frozen=True)
class EvaluationResult:
    """One evaluation of one model.

    ``averages`` are those of suites, ``missing`` says of each of their tasks that was not evaluated why.
    ``truncated`` counts the requests that lost their beginning, since they were longer than the model, and
    ``efforts`` say what answering took (None and empty where lm-eval's own model does not tell).
    ``settings`` are the arguments that decide the numbers, ``versions`` those of the software,
    ``seconds`` the wall time of the whole evaluation and ``finished`` its end, UTC, ISO 8601.
    """

    model: str
    tasks: list[TaskResult]
    averages: list[Average]
    missing: dict[str, str]
    truncated: int | None
    efforts: list[Effort]
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    finished: str

    def metric(self, task: str, name: str) -> float:
        """The value of metric ``name`` (first filter) of ``task``.

        Raises:
            KeyError: there is no such task or metric; the message says which there are.
        """
        found = {
            (task_result.name, metric.name): metric.value
            for task_result in self.tasks
            for metric in reversed(task_result.metrics)
        }
        if (task, name) not in found:
            raise KeyError(f"no metric {name!r} of task {task!r}; there are {sorted(found)}")
        return found[task, name]

    def table(self) -> str:
        """A plain-text table, one line a metric; an arrow says which way is better."""
        rows = [_row(task, metric) for task in self.tasks for metric in task.metrics]
        widths = [max(len(row[column]) for row in [_HEADERS, *rows]) for column in range(len(_HEADERS))]
        rule = "  ".join("-" * width for width in widths)
        lines = [_line(_HEADERS, widths), rule, *[_line(row, widths) for row in rows]]
        if self.averages:
            lines += ["", *[average.describe() for average in self.averages]]
        if self.truncated:
            lines += ["", f"{self.truncated} requests lost their beginning: they are longer than the model"]
        if self.missing:
            lines += ["", *[f"missing: {name}: {reason}" for name, reason in self.missing.items()]]
        for effort in self.efforts:
            lines += ["", *effort.describe()]
        return "\n".join(lines)

    def write_json(self, path: str | Path) -> None:
        """Write everything to ``path``, atomically; a value that is not finite is written as null."""
        with atomic_write(Path(path)) as stream:
            stream.write(as_json(self))


def as_json(result: Any) -> bytes:
    """A file's content: the fields of a dataclass, null for what is not finite."""
    text = json.dumps(_finite(asdict(result)), indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def collect_tasks(report: Mapping[str, Any]) -> list[TaskResult]:
    """The tasks in what ``lm_eval.evaluator.evaluate`` returns, in the order asked."""
    tasks = []
    for name, values in report["results"].items():
        samples = report["n-samples"].get(name, {})
        better = report["higher_is_better"].get(name, {})
        tasks.append(
            TaskResult(
                name=name,
                version=str(report["versions"].get(name, "")),
                num_fewshot=report["n-shot"].get(name),
                num_samples=samples.get("effective"),
                num_available=samples.get("original"),
                metrics=_collect_metrics(values, better),
            )
        )
    return tasks


def _collect_metrics(values: Mapping[str, Any], better: Mapping[str, Any]) -> list[MetricResult]:
    """lm-eval's flat ``{"acc,none": .., "acc_stderr,none": ..}`` as a list."""
    metrics = []
    for key, value in values.items():
        name, comma, filter_name = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        stderr = values.get(f"{name}_stderr,{filter_name}")
        metrics.append(
            MetricResult(
                name=name,
                filter=filter_name,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=better.get(name),
            )
        )
    return metrics


def _row(task: TaskResult, metric: MetricResult) -> tuple[str, ...]:
    arrow = {True: "↑", False: "↓", None: ""}[metric.higher_is_better]
    name = metric.name if metric.filter == "none" else f"{metric.name} ({metric.filter})"
    samples = "" if task.num_samples is None else str(task.num_samples)
    if task.num_available is not None and task.num_available != task.num_samples:
        samples += f"/{task.num_available}"
    return (
        task.name,
        task.version,
        "" if task.num_fewshot is None else str(task.num_fewshot),
        samples,
        name,
        arrow,
        _number(metric.value),
        "" if metric.stderr is None else _number(metric.stderr),
    )


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        cell.rjust(width) if column in _NUMBER_COLUMNS else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
