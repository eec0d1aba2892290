"""From names of tasks to lm-eval's task objects, with their examples."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skipmega.errors import ConfigError, DataError
from skipmega.evaluation.suite import WrittenSuite, find_suite, suite_names, write_suite_tasks


@dataclass(frozen=True)
class TaskSettings:
    """What the caller asked for, as documented in :func:`skipmega.evaluation.evaluate_tasks`."""

    tasks: Sequence[str]
    num_fewshot: int | None = None
    include_paths: Sequence[str | Path] = ()
    data_dir: str | Path | None = None
    limit: int | None = None
    batch_size: int = 8
    seed: int = 1234

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("no tasks were named: give at least one")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"num_fewshot={self.num_fewshot}: give 0 or more examples")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit}: give 1 or more documents, or leave it out for all")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}: give 1 or more sequences")
        for path in self.include_paths:
            if not Path(path).is_dir():
                raise ConfigError(f"include_paths: {path} is not a folder of task YAML files")

    def describe(self) -> dict[str, Any]:
        """As plain values for the result."""
        paths = [str(path) for path in self.include_paths]
        data_dir = None if self.data_dir is None else str(self.data_dir)
        return {**asdict(self), "tasks": list(self.tasks), "include_paths": paths, "data_dir": data_dir}


def write_suites(settings: TaskSettings, folder: str) -> tuple[list[WrittenSuite], list[str]]:
    """The suites among the tasks, their task files written to ``folder``; and the other tasks."""
    suites, others = [], []
    for name in settings.tasks:
        suite = find_suite(name)
        if suite is None:
            others.append(name)
        else:
            suites.append(write_suite_tasks(suite, settings.data_dir, folder))
    return suites, others


def load_tasks(
    settings: TaskSettings, suites: Sequence[WrittenSuite], others: Sequence[str], suites_dir: str
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The task objects by name, and the groups they are in, as ``lm_eval`` wants them; and why each of a
    suite's tasks that are not among them is missing."""
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}

    def load(manager: Any, name: str, shots: int | None) -> None:
        for part, items in _load_task(manager, name).items():
            loaded[part].update(items)
            for each, task in items.items() if part == "tasks" else ():
                _set_shots(each, task, shots, settings.seed)

    missing = {name: reason for written in suites for name, reason in written.missing.items()}
    for written in suites:
        shots = written.suite.shots if settings.num_fewshot is None else settings.num_fewshot
        manager, found = _find_tasks(written.tasks, [suites_dir])
        for name in found:
            try:
                load(manager, name, shots)
            except DataError as error:
                if settings.data_dir is not None:
                    raise
                missing[name] = str(error)
    if others:
        manager, found = _find_tasks(others, [str(path) for path in settings.include_paths])
        for name in found:
            load(manager, name, settings.num_fewshot)
    return loaded, missing


def _find_tasks(names: Sequence[str], include_paths: list[str]) -> tuple[Any, list[str]]:
    """A task manager that knows all of ``names``, and the names that they match."""
    from lm_eval.tasks import TaskManager

    for include_defaults in (False, True):
        manager = TaskManager(include_path=include_paths, include_defaults=include_defaults)
        matches = {name: manager.match_tasks([name]) for name in names}
        if all(matches.values()):
            return manager, list(dict.fromkeys(task for found in matches.values() for task in found))
    problems = [_unknown(name, manager.all_tasks) for name, found in matches.items() if not found]
    raise ConfigError("\n".join(problems))


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, [*known, *suite_names()], n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists lm-eval's own"
    return f"no task, group or tag is called {name!r} in the include paths or lm-eval; {hint}"


def _load_task(manager: Any, name: str) -> dict[str, dict[str, Any]]:
    from datasets.exceptions import DatasetsError

    try:
        loaded: dict[str, dict[str, Any]] = manager.load([name])
    except (OSError, ValueError, DatasetsError) as error:
        summary = str(error).strip().partition("\n")[0]
        raise DataError(
            f"task {name}: its data set cannot be loaded ({type(error).__name__}: {summary}); evaluation "
            "is offline: put the data into the Hugging Face cache or a local task "
            "(write_benchmark_tasks), or set HF_HUB_OFFLINE=0 to download"
        ) from error
    return loaded


def _set_shots(name: str, task: Any, num_fewshot: int | None, seed: int) -> None:
    default = task.get_config("num_fewshot")
    shots = default if num_fewshot is None or default == 0 else num_fewshot
    task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=seed)
    if not shots:
        return
    examples = task.fewshot_docs()
    available = 0 if examples is None else len(examples)
    split = task.get_config("fewshot_split")
    of_questions = split is not None and split == task.get_config("test_split")
    if available < shots + of_questions:
        beside = ", the question itself among them" if of_questions else ""
        raise ConfigError(
            f"num_fewshot={shots}, but task {name} has {available} examples to choose from{beside}: lower it"
        )
