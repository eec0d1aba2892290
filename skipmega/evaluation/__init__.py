"""Evaluation: any causal language model through lm-eval, and local tasks that need no network.

Importing this package imports neither lm-eval nor transformers; the evaluating functions do.
"""

from skipmega.evaluation.benchmarks import write_benchmark_tasks
from skipmega.evaluation.harness import evaluate_by_lm_eval, evaluate_export, evaluate_tasks
from skipmega.evaluation.interface import LanguageModel, TextTokenizer
from skipmega.evaluation.results import EvaluationResult, MetricResult, TaskResult
from skipmega.evaluation.tasks import write_continuation_task

__all__ = [
    "EvaluationResult",
    "LanguageModel",
    "MetricResult",
    "TaskResult",
    "TextTokenizer",
    "evaluate_by_lm_eval",
    "evaluate_export",
    "evaluate_tasks",
    "write_benchmark_tasks",
    "write_continuation_task",
]
