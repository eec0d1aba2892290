"""Running lm-eval tasks on a native model or on a Hugging Face export, with the same result type.

Without network by default: tasks come from local folders or lm-eval's own list, data from local files or
the Hugging Face cache. ``HF_HUB_OFFLINE=0`` in the environment allows downloads.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import skipmega
from skipmega.errors import CheckpointError, ConfigError
from skipmega.evaluation.averages import average_families
from skipmega.evaluation.interface import LanguageModel, TextTokenizer
from skipmega.evaluation.loading import TaskSettings, load_tasks, write_suites
from skipmega.evaluation.results import EvaluationResult, collect_tasks

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
        batch_size: texts of the model's length that are read at once; of short ones more, but for 1.
        seed: of the choice of few-shot examples.
        model_name: what the result calls the model.

    Raises:
        ConfigError: lm-eval is not installed, a task or folder does not exist, a setting cannot be used.
        DataError: a task's data set is not on this machine.
    """
    settings = TaskSettings(tasks, num_fewshot, include_paths, data_dir, limit, batch_size, seed)
    _prepare_lm_eval("lm_eval")
    from skipmega.evaluation.adapter import SkipmegaLM

    adapter = SkipmegaLM(model, tokenizer, batch_size, show_progress=_is_first_rank())
    return _evaluate(adapter, settings, model_name)


def evaluate_export(
    directory: str | Path, tasks: Sequence[str], *, device: str = "cpu", **settings: Any
) -> EvaluationResult:
    """Evaluate a Hugging Face model folder in float32, in one process.

    Any causal model of transformers, read as a native one is: shared beginnings once, generation from a
    cache. The code in the folder is run (``trust_remote_code``). The scores are those of ``lm_eval run
    --model hf --model_args pretrained=DIRECTORY,trust_remote_code=True,dtype=float32``, but for rounding.

    Args:
        directory: a folder with config.json, weights and a tokenizer.
        tasks: as for :func:`evaluate_tasks`, and so are ``settings``.
        device: "cpu" or "cuda".

    Raises:
        CheckpointError: ``directory`` is not a Hugging Face model folder, or lacks a tokenizer.
        ConfigError: as for :func:`evaluate_tasks`.
        DataError: as for :func:`evaluate_tasks`.
    """
    asked = _prepare_export(directory, tasks, settings)
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig, AutoTokenizer

    from skipmega.evaluation.adapter import SkipmegaLM
    from skipmega.hf.language_model import HuggingFaceModel, HuggingFaceTokenizer

    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    length = resolve_max_length(config, tokenizer, default=HFLM._DEFAULT_MAX_LENGTH)
    model = HuggingFaceModel.load(str(directory), length, device)
    adapter = SkipmegaLM(model, HuggingFaceTokenizer(tokenizer), asked.batch_size)
    return _evaluate(adapter, asked, str(directory))


def evaluate_by_lm_eval(
    directory: str | Path,
    tasks: Sequence[str],
    *,
    device: str = "cpu",
    **settings: Any,
) -> EvaluationResult:
    """The same as :func:`evaluate_export` with lm-eval's own ``hf`` model: what skipmega is compared with.

    Arguments and errors are the same.
    """
    asked = _prepare_export(directory, tasks, settings)
    from lm_eval.models.huggingface import HFLM

    adapter = HFLM(
        pretrained=str(directory),
        trust_remote_code=True,
        dtype="float32",
        device=device,
        batch_size=asked.batch_size,
    )
    return _evaluate(adapter, asked, str(directory))


def _prepare_export(directory: str | Path, tasks: Sequence[str], settings: dict[str, Any]) -> TaskSettings:
    for name, what in (("config.json", "model"), ("tokenizer_config.json", "tokenizer")):
        if not (Path(directory) / name).is_file():
            raise CheckpointError(
                f"{directory} has no {name}: give the folder of a Hugging Face export with its {what}"
            )
    asked = TaskSettings(tasks, **settings)
    _prepare_lm_eval("lm_eval", "transformers", "accelerate")
    return asked


def _evaluate(adapter: Any, settings: TaskSettings, model_name: str) -> EvaluationResult:
    from lm_eval.evaluator import evaluate

    started = time.perf_counter()
    with _only_first_rank_prints(), tempfile.TemporaryDirectory() as suites_dir:
        suites, others = write_suites(settings, suites_dir)
        loaded, missing = load_tasks(settings, suites, others, suites_dir)
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
        efforts=adapter.efforts() if hasattr(adapter, "efforts") else [],
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
