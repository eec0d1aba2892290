"""A suite: a list of lm-eval tasks, where their data may lie on this machine, and what is averaged.

The example in front of a question is the first one of the task's examples that is not the question itself, so
nearly all prompts of a task begin alike, and neither a limit nor the order of questions changes them.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from skipmega.config.base import Section
from skipmega.errors import ConfigError, DataError
from skipmega.evaluation.benchmarks import benchmark_yaml
from skipmega.evaluation.records import Record, check_task_name, numbered_records, write_yaml

Family = Literal["generation", "understanding"]

SUITES_DIR = Path(__file__).with_name("suites")
FAMILIES: tuple[Family, ...] = ("generation", "understanding")
_SUFFIXES = {".jsonl": "json", ".parquet": "parquet"}


class SuiteTask(Section):
    """One task of a suite; the comment in ``suites/skiplayer24.yaml`` says what the fields are."""

    family: Family | None
    base: str
    metric: str
    split: str
    examples: str
    files: list[str] = Field(default_factory=list)
    columns: list[str] = Field(default_factory=list)
    overrides: dict[str, Any] = Field(default_factory=dict)


class Suite(Section):
    """Tasks by name; bases beginning with ``./`` lie in folder ``source``, or beside the shipped suites."""

    name: str
    shots: int = Field(ge=0)
    tasks: dict[str, SuiteTask] = Field(min_length=1)
    source: str

    def task_name(self, name: str) -> str:
        """What lm-eval calls a task of the suite."""
        return f"{self.name}_{name}"


@dataclass(frozen=True)
class WrittenSuite:
    """Task files made of a suite: lm-eval's names of those with data, and why each of the others is
    ``missing``."""

    suite: Suite
    tasks: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def suite_names() -> list[str]:
    """The suites that come with skipmega."""
    return sorted(path.stem for path in SUITES_DIR.glob("*.yaml") if _is_suite(path))


def find_suite(name: str) -> Suite | None:
    """The suite called ``name``, or in the YAML file ``name``; None if there is none.

    Raises:
        ConfigError: it is a file that holds no suite.
    """
    if name in suite_names():
        return _read_suite(SUITES_DIR / f"{name}.yaml")
    if name.endswith((".yaml", ".yml")):
        return _read_suite(Path(name))
    return None


def write_suite_tasks(suite: Suite, data_dir: str | Path | None, out_dir: str | Path) -> WrittenSuite:
    """Write an lm-eval task file for each task of ``suite`` whose data may be had.

    A set lies in ``data_dir`` as ``TASK/SPLIT.jsonl`` or ``.parquet``, the data set's own columns, and is
    asked as lm-eval asks; or as one file ``NAME.jsonl`` of finished questions (the kinds of
    :func:`skipmega.evaluation.write_benchmark_tasks`), whose examples are questions of the same file.

    Args:
        suite: which tasks.
        data_dir: None leaves data to lm-eval: the Hugging Face cache, or the network if that is allowed.
        out_dir: folder for ``SUITE_TASK.yaml`` files, for ``lm_eval --include_path`` too.

    Raises:
        ConfigError: ``data_dir`` is no folder, or lm-eval lacks a base.
        DataError: a row that cannot be used, with file and line.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ConfigError(f"data_dir: {data_dir} is not a folder of evaluation sets")
    written = WrittenSuite(suite)
    for name, task in suite.tasks.items():
        full_name = suite.task_name(name)
        check_task_name(full_name)
        values: Record | None = _based(suite, full_name, task, {})
        if data_dir is not None:
            values = _of_local_files(suite, name, task, Path(data_dir).resolve())
        if values is None:
            wanted = [f"{name}/{task.split}.jsonl", *(f"{stem}.jsonl" for stem in task.files)]
            written.missing[full_name] = f"{data_dir} has none of {', '.join(wanted)}"
            continue
        write_yaml(Path(out_dir) / f"{full_name}.yaml", values)
        written.tasks.append(full_name)
    return written


def _is_suite(path: Path) -> bool:
    return "\ntasks:" in path.read_text(encoding="utf-8")


def _read_suite(path: Path) -> Suite:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read suite {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"suite {path} has no fields name, shots and tasks")
    try:
        return Suite(**values, source=str(path.resolve().parent))
    except (ValidationError, TypeError) as error:
        raise ConfigError(f"suite {path}: {error}") from None


def _of_local_files(suite: Suite, name: str, task: SuiteTask, data_dir: Path) -> Record | None:
    """The task's YAML on its files in ``data_dir``; None if there are none."""
    full_name = suite.task_name(name)
    own = {split: _split_file(data_dir / name, split) for split in (task.split, task.examples)}
    if asked := own[task.split]:
        missing = [split for split, path in own.items() if path is None]
        if missing:
            raise DataError(
                f"{asked} is there, but {data_dir / name} has no {missing[0]}.jsonl for the examples: "
                "add it, or change `examples` in a copy of the suite"
            )
        files = {split: path for split, path in own.items() if path is not None}
        for path in files.values():
            _check_columns(path, task.columns)
        kinds = {_SUFFIXES[path.suffix] for path in files.values()}
        if len(kinds) > 1:
            raise DataError(f"{data_dir / name} mixes jsonl and parquet: use one of them")
        data = {
            "dataset_path": kinds.pop(),
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
            **_other_splits(task),
        }
        return _based(suite, full_name, task, data)
    for stem in task.files:
        path = data_dir / f"{stem}.jsonl"
        if path.is_file():
            values = benchmark_yaml(full_name, path)
            metrics = [metric["metric"] for metric in values["metric_list"]]
            if task.metric not in metrics:
                raise DataError(
                    f"{path} has questions scored by {', '.join(metrics)}, but the suite averages "
                    f"{task.metric} of {name}: is it another set?"
                )
            return values | _shared_example("test")
    return None


def _based(suite: Suite, full_name: str, task: SuiteTask, data: Record) -> Record:
    base = _base_file(suite, task.base)
    values = {"include": str(base), "task": full_name, "tag": None, **task.overrides, **data}
    return values | _shared_example(task.examples)


def _base_file(suite: Suite, base: str) -> Path:
    if base.startswith("./"):
        path = Path(suite.source) / base
        if not path.is_file():  # a copy of a shipped suite
            path = SUITES_DIR / base
    else:
        spec = find_spec("lm_eval")
        if spec is None or spec.origin is None:
            raise ConfigError("evaluation needs the package lm_eval: pip install 'skipmega[eval,hf]'")
        path = Path(spec.origin).parent / "tasks" / base
    if not path.is_file():
        raise ConfigError(f"suite {suite.name}: base {base} is not a task file ({path} does not exist)")
    return path.resolve()


def _shared_example(split: str) -> Record:
    return {"fewshot_split": split, "fewshot_config": {"sampler": "first_n"}}


def _other_splits(task: SuiteTask) -> Record:
    """Only the two splits exist locally. lm-eval keeps a question out of its own examples only if the
    examples are its *test* split."""
    training = None if task.examples == task.split else task.examples
    return {"training_split": training, "validation_split": None, "test_split": task.split}


def _split_file(folder: Path, split: str) -> Path | None:
    found = [path for suffix in _SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
    return found[0] if found else None


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    """Refuse a file without rows, or with a row that lacks a column."""
    rows = 0
    for number, row in _rows(path):
        rows = number
        for column in columns:
            if column not in row:
                near = difflib.get_close_matches(column, row, n=1)
                hint = f"; is {near[0]} meant?" if near else ""
                raise DataError(f"{path}, line {number}: no field {column}, there are {', '.join(row)}{hint}")
    if not rows:
        raise DataError(f"{path} is empty")


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows with their line numbers; of a parquet file its columns, once."""
    if path.suffix == ".jsonl":
        yield from numbered_records(path)
        return
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        schema = parquet.read_schema(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from None
    yield 1, dict.fromkeys(schema.names)
