"""What a comparison of step times consists of, the worlds that measure it, and its table.

Every grid is started once, as a world of its own processes that measures one model after the other; what has
been measured is kept in ``OUTPUT/steps.jsonl`` and not repeated.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from skipmega.config import RunConfig, load_config, resolve_grid
from skipmega.config.base import Section
from skipmega.errors import ConfigError
from skipmega.experiments.plan import expand_overrides


class GridRow(Section):
    """A grid: how many processes it takes, its overrides, and which models run on it (all if left out)."""

    processes: int = Field(ge=1)
    overrides: list[str] = Field(default_factory=list)
    models: list[str] | None = None


class StepPlan(Section):
    """The YAML file of a comparison.

    ``base`` is a run configuration, relative to the plan; each of ``models`` and each of ``grids`` adds
    overrides to it (an entry of a model without ``=`` names one whose overrides come first). ``train_steps``
    are run first and count nothing (compilation, and routers that have learnt something), then
    ``timed_steps``. Without ``shards`` the tokens are random; with them, data rank i reads token dataset i
    alone, which is as unlike as ranks can be.
    """

    base: str
    models: dict[str, list[str]]
    grids: dict[str, GridRow]
    train_steps: int = Field(3, ge=1)
    timed_steps: int = Field(5, ge=1)
    shards: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits(self) -> "StepPlan":
        for model in self.models:
            self.overrides(model)
        for grid, row in self.grids.items():
            if unknown := set(row.models or []) - set(self.models):
                raise ValueError(f"grid {grid} names models that are not there: {', '.join(unknown)}")
        return self

    def overrides(self, model: str) -> list[str]:
        """All overrides of a model, those of the models it builds on first."""
        return expand_overrides(self.models, model)

    def models_on(self, grid: str) -> list[str]:
        """Names of the models that run on ``grid``."""
        return self.grids[grid].models or list(self.models)


def load_step_plan(path: Path) -> StepPlan:
    """Read a plan and build every configuration in it.

    Raises:
        ConfigError: the file cannot be read, is no plan, or a grid refuses a model.
    """
    try:
        plan = StepPlan.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read plan {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{path} is no plan of step times: {error}") from None
    for grid, row in plan.grids.items():
        for model in plan.models_on(grid):
            config = step_config(path, plan, grid, model)
            if config.model.vocab_size is not None:  # or its tokenizer says it, which the worlds read
                resolve_grid(config, row.processes)
    return plan


def step_config(path: Path, plan: StepPlan, grid: str, model: str) -> RunConfig:
    """The configuration of ``model`` on ``grid``, its grid not yet resolved."""
    return load_config(path.parent / plan.base, [*plan.overrides(model), *plan.grids[grid].overrides])


def run_plan(script: Path, path: Path, plan: StepPlan, output: Path, deadline: float | None) -> None:
    """Start a world for every grid that has something left to measure; a world that fails is reported.

    Args:
        script: what torchrun starts with ``PLAN --output OUTPUT --inside GRID``.
        path: the plan's file.
        plan: what it says.
        output: folder of ``steps.jsonl`` and the worlds' logs.
        deadline: a world that runs after so many seconds is ended; None for no limit.
    """
    output.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    for grid, row in plan.grids.items():
        if not missing_models(plan, grid, output):
            continue
        remaining = None if deadline is None else deadline - (time.monotonic() - begun)
        if remaining is not None and remaining <= 0:
            return
        log = output / f"{grid}.log"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={row.processes}", str(script), str(path), "--output", str(output),
            "--inside", grid,
        ]  # fmt: skip
        code = _run(command, log, remaining)
        if code is None:
            print(f"{grid}: ended at the deadline", flush=True)
            return
        done = "measured" if code == 0 else f"FAILED with code {code}"
        print(f"[{time.monotonic() - begun:4.0f} s] {grid}: {done}, see {log}", flush=True)


def _run(command: list[str], log: Path, limit: float | None) -> int | None:
    """Exit code, its output in ``log``; None if it outlasts ``limit`` seconds and is ended."""
    with log.open("w") as stream:
        launcher = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            return launcher.wait(limit)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # torchrun ends its processes, the slow ones after 30 s
            launcher.wait()
            return None


def missing_models(plan: StepPlan, grid: str, output: Path) -> list[str]:
    """Models of ``grid`` that ``output`` has no record of."""
    done = {record["model"] for record in read_records(output) if record["grid"] == grid}
    return [model for model in plan.models_on(grid) if model not in done]


def read_records(output: Path) -> list[dict[str, Any]]:
    """What has been measured so far."""
    path = output / "steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def markdown_table(plan: StepPlan, records: list[dict[str, Any]]) -> str:
    """One line for every model on every grid; speed is relative to the plan's first grid, per device."""
    lines = [
        "| model | grid | ms per step (range) | tokens/s a device | of the first grid | TFLOP/s a device "
        "| communication, ms | peak GiB | rank imbalance | moved |",
        "|---" * 10 + "|",
    ]
    for model in plan.models:
        of_model = [record for record in records if record["model"] == model]
        base = next((r for r in of_model if r["grid"] == next(iter(plan.grids))), None)
        for r in of_model:
            waited = r["communication_seconds"]
            rate = r["tokens_per_second_per_device"]
            cells = [
                model,
                r["grid"],
                f"{r['seconds_per_step'] * 1e3:.0f} ({r['fastest'] * 1e3:.0f}-{r['slowest'] * 1e3:.0f})",
                f"{rate:,.0f}",
                f"{rate / base['tokens_per_second_per_device']:.2f}" if base else "",
                f"{r['executed_tflops_per_device']:.0f}",
                "" if waited is None else f"{waited * 1e3:.0f}",
                f"{r['peak_memory_gib']:.1f}",
                f"{r['rank_imbalance']:.3f}" if "rank_imbalance" in r else "",
                f"{r['moved']:.1%}" if r.get("moved") else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
