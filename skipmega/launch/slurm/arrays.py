"""Several runs of one configuration as one job array, each with overrides, folder and attempts of its own."""

import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from skipmega.config import RunConfig, load_config
from skipmega.errors import ConfigError
from skipmega.launch.slurm import client
from skipmega.launch.slurm.jobs import (
    Job,
    Submission,
    record_job,
    snapshot,
    write_config,
    writing,
)

_LONGEST_NAME = 120


def read_array(given: str) -> list[list[str]]:
    """The overrides of each run: from ``FIELD=A,B,C``, or from a file that has those of one run in a line.

    Raises:
        ConfigError: it is neither, or nothing stands in it, or two runs are the same.
    """
    if Path(given).is_file():
        lines = Path(given).read_text(encoding="utf-8").splitlines()
        runs = [shlex.split(line, comments=True) for line in lines]
        runs = [run for run in runs if run]
    elif "=" in given:
        field, _, values = given.partition("=")
        runs = [[f"{field}={value}"] for value in values.split(",")]
    else:
        raise ConfigError(f"--array {given} is no file, and not of the form FIELD=VALUE,VALUE")
    names = [folder_of(run) for run in runs]
    if not names:
        raise ConfigError(f"--array {given} names no run: put the overrides of each in a line")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"--array {given}: two runs would share the folder {name}; their overrides must differ"
            )
    return runs


def folder_of(overrides: Sequence[str]) -> str:
    """The name of a run's folder: its overrides, as far as a short file name can show them."""
    whole = ",".join(overrides)
    name = re.sub(r"[^\w.,=+-]", "-", whole, flags=re.ASCII)
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def load_runs(path: str | None, overrides: Sequence[str], array: Sequence[Sequence[str]]) -> list[RunConfig]:
    """The configurations of an array's runs, each in a folder within ``run_dir``.

    Args:
        path: of the configuration.
        overrides: of all runs.
        array: of each, beyond these.

    Raises:
        ConfigError: one is none, or names a ``run_dir`` of its own.
    """
    base = load_config(path, list(overrides)).run_dir
    if (Path(base) / "config.yaml").is_file():
        raise ConfigError(f"run_dir={base} holds a single run: give the array a folder of its own")
    runs = []
    for number, own in enumerate(array):
        where = f"run {number} of --array ({' '.join(own)})"
        if any(override.startswith("run_dir=") for override in own):
            raise ConfigError(f"{where}: its folder is named after its overrides; give run_dir for all")
        try:
            config = load_config(path, [*overrides, *own])
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        runs.append(config.model_copy(update={"run_dir": str(Path(base) / folder_of(own))}))
    return runs


def submit_array(
    configs: Sequence[RunConfig], job: Job, script: str, submission: Submission, root: Path
) -> int:
    """Write the configuration of every run and one copy of the code, and queue the array; returns its number.

    Args:
        configs: of the runs, by task.
        job: what each is to get.
        script: of the array.
        submission: the array's; those of its runs have the same number.
        root: the repository, as in :func:`skipmega.launch.slurm.jobs.submit_job`.

    Raises:
        LaunchError: a folder cannot be written, or SLURM refuses.
    """
    client.ask_whether_it_could_run(script)
    runs = [submission.of_run(config.run_dir) for config in configs]
    with writing(submission.path):
        snapshot(root, submission, script)
        for task, (run, config) in enumerate(zip(runs, configs, strict=True)):
            write_config(run, config)
            (submission.path / f"log-{task}").symlink_to(run.log)  # SLURM can name logs by numbers only
        submission.runs.write_text(json.dumps([Path(config.run_dir).name for config in configs]))
    number = client.submit(script)
    for task, run in enumerate(runs):
        record_job(run, f"{number}_{task}", job, root)
    return number
