"""Running lm-eval tasks on a native model or on a Hugging Face export, with the same result type.

Without network by default: tasks come from local folders or lm-eval's own list, data from local files or
the Hugging Face cache. ``HF_HUB_OFFLINE=0`` in the environment allows downloads.
"""

import contextlib
import difflib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import skipmega
from skipmega.errors import CheckpointError, ConfigError, DataError
from skipmega.evaluation.averages import average_families
from skipmega.evaluation.interface import LanguageModel, TextTokenizer
from skipmega.evaluation.results import EvaluationResult, collect_tasks
from skipmega.evaluation.suite import WrittenSuite, find_suite, suite_names, write_suite_tasks

# Resamples behind the standard error of metrics without a closed form (perplexity).
BOOTSTRAP_RESAMPLES = 1000


def evaluate_tasks(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    include_paths: Sequence[str | Path] = (),
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 1234,
    model_name: str = "native",
) -> EvaluationResult:
    """Evaluate ``model`` on lm-eval tasks.

    Every process of the model's grid calls this with the same arguments and gets the same result; only
    rank 0 prints.

    Args:
        model: the model; its own mode (evaluation, no dropout) is the caller's to set.
        tokenizer: the model's own.
        tasks: names or patterns (``local_*``) of tasks, groups or tags; ``skiplayer24`` and YAML files are
            suites, whose sets that are not here are listed as missing.
        num_fewshot: examples in front of each question; None leaves each task its default. A task that
            fixes zero, as a rolling one does, keeps zero.
        include_paths: folders with task YAML files. When they hold all ``tasks``, lm-eval's own list of
            some 15,000 is not read, which saves many seconds.
        data_dir: folder of a suite's sets, see :func:`skipmega.evaluation.suite.write_suite_tasks`; None
            leaves data to lm-eval.
        limit: evaluate only the first ``limit`` documents of each task.
        batch_size: sequences in one call of the model.
        seed: of the choice of few-shot examples.
        model_name: what the result calls the model.

    Raises:
        ConfigError: lm-eval is not installed, a task or folder does not exist, a setting cannot be used.
        DataError: a task's data set is not on this machine.
    """
    settings = _Settings(tasks, num_fewshot, include_paths, data_dir, limit, batch_size, seed)
    _prepare_lm_eval("lm_eval")
    from skipmega.evaluation.adapter import SkipmegaLM

    adapter = SkipmegaLM(model, tokenizer, batch_size, show_progress=_is_first_rank())
    return _evaluate(adapter, settings, model_name)


def evaluate_export(
    directory: str | Path,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    include_paths: Sequence[str | Path] = (),
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 1234,
    device: str = "cpu",
) -> EvaluationResult:
    """Evaluate a Hugging Face model folder through lm-eval's own ``hf`` model, in float32, one process.

    The code in the folder is run (``trust_remote_code``). The numbers are those of ``lm_eval run --model
    hf --model_args pretrained=DIRECTORY,trust_remote_code=True,dtype=float32``. On the same weights they
    are also those of :func:`evaluate_tasks` if the tokenizer adds no special tokens and has no
    ``bos_token`` (what has no context is then conditioned on the ``eos_token``, as in training), and
    ``max_position_embeddings`` is the model's ``max_length``; with skipmega's exports it is so.

    Args:
        directory: a folder with config.json, weights and a tokenizer.
        device: "cpu" or "cuda".

    The other arguments are those of :func:`evaluate_tasks`.

    Raises:
        CheckpointError: ``directory`` is not a Hugging Face model folder, or lacks a tokenizer.
        ConfigError: as for :func:`evaluate_tasks`.
        DataError: as for :func:`evaluate_tasks`.
    """
    directory = Path(directory)
    for name, what in (("config.json", "model"), ("tokenizer_config.json", "tokenizer")):
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{directory} has no {name}: give the folder of a Hugging Face export with its {what}"
            )
    settings = _Settings(tasks, num_fewshot, include_paths, data_dir, limit, batch_size, seed)
    _prepare_lm_eval("lm_eval", "transformers", "accelerate")
    from lm_eval.models.huggingface import HFLM

    adapter = HFLM(
        pretrained=str(directory),
        trust_remote_code=True,
        dtype="float32",
        device=device,
        batch_size=batch_size,
    )
    return _evaluate(adapter, settings, str(directory))


@dataclass(frozen=True)
class _Settings:
    """What the caller asked for, as documented in :func:`evaluate_tasks`."""

    tasks: Sequence[str]
    num_fewshot: int | None
    include_paths: Sequence[str | Path]
    data_dir: str | Path | None
    limit: int | None
    batch_size: int
    seed: int

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


def _evaluate(adapter: Any, settings: _Settings, model_name: str) -> EvaluationResult:
    from lm_eval.evaluator import evaluate

    started = time.perf_counter()
    with _only_first_rank_prints(), tempfile.TemporaryDirectory() as suites_dir:
        suites, others = _write_suites(settings, suites_dir)
        loaded, missing = _load_tasks(settings, suites, others, suites_dir)
        report = (
            {"results": {}}
            if not loaded["tasks"]
            else evaluate(
                lm=adapter,
                task_dict=loaded,
                limit=settings.limit,
                bootstrap_iters=BOOTSTRAP_RESAMPLES,
                log_samples=False,
            )
        )
    tasks = collect_tasks(report)
    return EvaluationResult(
        model=model_name,
        tasks=tasks,
        averages=[average for written in suites for average in average_families(written.suite, tasks)],
        missing=missing,
        truncated=getattr(adapter, "truncated", None),
        settings=settings.describe(),
        versions=_versions(),
        seconds=time.perf_counter() - started,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _prepare_lm_eval(*needed: str) -> None:
    """Check that the packages are installed and set what they read from the environment."""
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"evaluation needs the package {package}, which is not installed: "
                "pip install 'skipmega[eval,hf]'"
            )
    # Workers forked from a process that holds CUDA or process groups can hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    _stay_offline()


def _stay_offline() -> None:
    """Look nothing up on the network, unless the user set ``HF_HUB_OFFLINE``.

    The variables are read when ``huggingface_hub`` and ``datasets`` are first imported. A program that
    read a corpus before it evaluates has imported them already: they are told as well.
    """
    if "HF_HUB_OFFLINE" in os.environ:
        return
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            vars(sys.modules[module])["HF_HUB_OFFLINE"] = True


def _write_suites(settings: _Settings, folder: str) -> tuple[list[WrittenSuite], list[str]]:
    """The suites among the tasks, their task files written to ``folder``; and the other tasks."""
    suites, others = [], []
    for name in settings.tasks:
        suite = find_suite(name)
        if suite is None:
            others.append(name)
        else:
            suites.append(write_suite_tasks(suite, settings.data_dir, folder))
    return suites, others


def _load_tasks(
    settings: _Settings, suites: Sequence[WrittenSuite], others: Sequence[str], suites_dir: str
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
    available = 0 if examples is None else len(list(examples))
    if available < shots:
        raise ConfigError(
            f"num_fewshot={shots}, but task {name} has {available} examples to choose from: lower it"
        )


def _versions() -> dict[str, str]:
    versions = {"skipmega": skipmega.__version__}
    for package in ("lm_eval", "datasets", "transformers", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _is_first_rank() -> bool:
    distributed = torch.distributed
    return not distributed.is_available() or not distributed.is_initialized() or not distributed.get_rank()


@contextlib.contextmanager
def _only_first_rank_prints() -> Iterator[None]:
    """lm-eval's progress bars and messages appear once, not once a process."""
    if _is_first_rank():
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
