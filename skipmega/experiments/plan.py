"""What a ladder compares: rows, each a configuration, and which runs of a row are still to be made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from skipmega.config import RunConfig, load_config
from skipmega.config.base import Section
from skipmega.errors import ConfigError


class LadderPlan(Section):
    """The YAML file of a ladder.

    ``base`` is a run configuration, relative to the plan; every row in ``rows`` is it with the row's
    overrides (``section.field=value``; an entry without ``=`` names a row whose overrides come first).
    ``reference`` names the row that the others are compared with. Every row is trained at each of ``rates``
    (peak learning rates, ascending by a constant factor) with the first of ``seeds``; where the best one lies
    at an end, the range is extended by at most ``extensions`` rates there. A single rate is no sweep. The
    best rate is repeated with the other seeds.
    """

    base: str
    reference: str
    rates: list[float] = Field(min_length=1)
    extensions: int = Field(2, ge=0)
    seeds: list[int] = Field(min_length=1)
    rows: dict[str, list[str]]

    @model_validator(mode="after")
    def _fits(self) -> "LadderPlan":
        if self.reference not in self.rows:
            raise ValueError(f"reference={self.reference} is not one of the rows: {', '.join(self.rows)}")
        if self.rates != sorted(set(self.rates)):
            raise ValueError(f"rates={self.rates} must rise")
        if len(self.rates) < 3 and (len(self.rates) > 1 or self.extensions):
            raise ValueError(f"rates={self.rates}: give three or more, or a single one and extensions=0")
        for row in self.rows:
            self.overrides(row)
        return self

    def overrides(self, row: str) -> list[str]:
        """All overrides of a row, those of the rows it builds on first."""
        return expand_overrides(self.rows, row)


def expand_overrides(rows: dict[str, list[str]], row: str) -> list[str]:
    """The overrides of ``row``, those of the rows it builds on first.

    Args:
        rows: lists of ``section.field=value``, or names of rows that come before.
        row: one of them.

    Raises:
        ValueError: an entry is neither.
    """
    found = []
    for entry in rows[row]:
        if "=" in entry:
            found.append(entry)
        elif entry in rows and list(rows).index(entry) < list(rows).index(row):
            found += expand_overrides(rows, entry)
        else:
            raise ValueError(f"row {row}: {entry!r} is no section.field=value and no row before this one")
    return found


@dataclass(frozen=True)
class Trial:
    """One training run of a row."""

    row: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.row}-{self.rate:g}-{self.seed}"


def load_plan(path: str | Path) -> LadderPlan:
    """Read a plan.

    Raises:
        ConfigError: the file cannot be read or is no plan.
    """
    try:
        plan = LadderPlan.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read ladder plan {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path} is not a ladder plan: {found}") from None
    for row in plan.rows:
        row_config(path, plan, row)
    return plan


def row_config(path: str | Path, plan: LadderPlan, row: str, *overrides: str) -> RunConfig:
    """The run configuration of ``row``, with more overrides."""
    return load_config(Path(path).parent / plan.base, [*plan.overrides(row), *overrides])


def next_trials(plan: LadderPlan, row: str, losses: dict[Trial, float | None]) -> list[Trial]:
    """Trials of ``row`` that can be started now.

    Args:
        plan: the ladder.
        row: one of its rows.
        losses: held-out loss of every trial begun: None while it runs, infinity where it diverged.
    """
    first = plan.seeds[0]
    sweep = [Trial(row, rate, first) for rate in plan.rates]
    missing = [trial for trial in sweep if trial not in losses]
    if missing:
        return missing
    best = best_trial(plan, row, losses)
    if best is None:
        return []
    wider = _beyond(plan, row, best, losses)
    if wider is not None:
        return [wider]
    return [t for seed in plan.seeds[1:] if (t := Trial(row, best.rate, seed)) not in losses]


def best_trial(plan: LadderPlan, row: str, losses: dict[Trial, float | None]) -> Trial | None:
    """The trial of the sweep with the least loss; None while one of it runs."""
    swept = {t: loss for t, loss in losses.items() if t.row == row and t.seed == plan.seeds[0]}
    finished = {t: loss for t, loss in swept.items() if loss is not None}
    if not finished or len(finished) < len(swept):
        return None
    return min(finished, key=lambda trial: finished[trial])


def is_at_an_end(plan: LadderPlan, best: Trial, losses: dict[Trial, Any]) -> bool:
    """Whether the best rate is the smallest or largest tried."""
    tried = [t.rate for t in losses if t.row == best.row and t.seed == plan.seeds[0]]
    return len(tried) > 1 and best.rate in (min(tried), max(tried))


def _beyond(plan: LadderPlan, row: str, best: Trial, losses: dict[Trial, float | None]) -> Trial | None:
    """The next rate beyond the best one, if that lies at an end and the range may grow."""
    tried = sorted(t.rate for t in losses if t.row == row and t.seed == plan.seeds[0])
    if not is_at_an_end(plan, best, losses) or len(tried) >= len(plan.rates) + plan.extensions:
        return None
    factor = plan.rates[1] / plan.rates[0]
    return Trial(row, best.rate * factor if best.rate == tried[-1] else best.rate / factor, plan.seeds[0])
