"""Tasks that are evaluated while a run trains, with the weights where they are."""

import tempfile
from collections.abc import Callable
from typing import Any

from skipmega.config import EvaluationConfig
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import DataError
from skipmega.evaluation import evaluate_tasks
from skipmega.evaluation.suite import find_suite, write_suite_tasks
from skipmega.inference.native import NativeModel
from skipmega.training.engine import TrainingEngine


class LiveTasks:
    """Evaluates the tasks of ``evaluation`` on an engine's present weights; replicas share the questions."""

    def __init__(self, engine: TrainingEngine, tokenizer: Tokenizer) -> None:
        self._engine, self._tokenizer = engine, tokenizer

    def ask(self, beat: Callable[[int, str], None], step: int) -> dict[str, Any]:
        """Evaluate as after ``step`` steps; all processes call it together, and get the same.

        Returns:
            ``TASK/METRIC`` and ``SUITE/FAMILY`` of families without a missing set, ``missing`` names those,
            ``seconds`` what it took, ``score/ms_p50`` and others what single inputs did.
        """
        engine, settings = self._engine, self._engine.config.evaluation
        (routing,) = engine.routing
        model = NativeModel(
            engine.config,
            engine.grid,
            engine.stage,
            routing,
            step,
            before_pass=lambda: beat(step, "evaluation of tasks"),
        )
        try:
            result = evaluate_tasks(
                model,
                self._tokenizer,
                settings.tasks,
                num_fewshot=settings.num_fewshot,
                include_paths=settings.include_paths,
                data_dir=settings.data_dir,
                limit=settings.limit,
                batch_size=settings.batch_size,
            )
        finally:
            engine.stage.train()
        scores = {
            f"{task.name}/{metric.name}": metric.value for task in result.tasks for metric in task.metrics
        }
        averages = {
            f"{average.suite}/{average.family}": average.value
            for average in result.averages
            if average.complete
        }
        took = {key: value for effort in result.efforts for key, value in effort.numbers().items()}
        told = {
            "missing": ", ".join(result.missing),
            "truncated": result.truncated,
            "seconds": result.seconds,
        }
        return {**scores, **averages, **told, **took}


def check_tasks(settings: EvaluationConfig) -> None:
    """Refuse, before a run starts, suites that cannot be evaluated.

    Raises:
        ConfigError: a suite or folder that cannot be read.
        DataError: rows that cannot be used, or no set at all.
    """
    for name in settings.tasks:
        suite = find_suite(name)
        if suite is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            if not write_suite_tasks(suite, settings.data_dir, folder).tasks:
                raise DataError(
                    f"evaluation.data_dir={settings.data_dir} has no set of suite {name}: give the folder "
                    "that has some, or set evaluation.interval=0"
                )
