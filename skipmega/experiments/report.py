"""The table and the figure of a ladder."""

from dataclasses import dataclass
from pathlib import Path

from skipmega.experiments.plan import LadderPlan, Trial, best_trial, is_at_an_end
from skipmega.experiments.runner import TrialResult
from skipmega.inspection.figures import plot_curves, plot_tradeoff


@dataclass(frozen=True)
class RowSummary:
    """A row at its best rate, that of its trial ``best``.

    ``loss`` is the mean over ``seeds`` seeds, ``spread`` half the distance between the least and the
    greatest; ``flops`` and ``step_time`` (None where it was not measured) are relative to the reference row;
    ``density_error`` is the largest distance of a layer's held-out density from ``targets``.
    """

    row: str
    loss: float
    spread: float
    seeds: int
    best: Trial
    rate_inside: bool
    sweep: dict[float, float]
    flops: float
    step_time: float | None
    density: float | None
    density_error: float | None


def summarise_rows(
    plan: LadderPlan,
    results: list[TrialResult],
    targets: dict[str, list[float]],
    seconds: dict[str, float],
) -> list[RowSummary]:
    """Every row that has a finished sweep, the reference first, then by loss.

    Args:
        plan: the ladder.
        results: finished trials.
        targets: target densities of each row's routed layers, as evaluation should have them.
        seconds: per step with a device to itself, by row.
    """
    losses: dict[Trial, float | None] = {result.trial: result.loss for result in results}
    by_trial = {result.trial: result for result in results}
    rows = {}
    for row in plan.rows:
        best = best_trial(plan, row, losses)
        if best is None:
            continue
        at_best = [r for r in results if r.row == row and r.rate == best.rate]
        values = [r.loss for r in at_best]
        found = by_trial[best].held_out_density
        errors = [abs(d - t) for d, t in zip(found, targets[row], strict=False)]
        rows[row] = RowSummary(
            row=row,
            loss=sum(values) / len(values),
            spread=(max(values) - min(values)) / 2,
            seeds=len(values),
            best=best,
            rate_inside=not is_at_an_end(plan, best, losses),
            sweep=_sweep(plan, row, results),
            flops=by_trial[best].flops,
            step_time=seconds.get(row),
            density=sum(found) / len(found) if found else None,
            density_error=max(errors) if errors else None,
        )  # fmt: skip
    reference = rows.get(plan.reference)
    scaled = [_relative(summary, reference) for summary in rows.values()]
    return sorted(scaled, key=lambda summary: (summary.row != plan.reference, summary.loss))


def _sweep(plan: LadderPlan, row: str, results: list[TrialResult]) -> dict[float, float]:
    """Loss by rate, of the first seed."""
    swept = sorted((r.rate, r.loss) for r in results if r.row == row and r.seed == plan.seeds[0])
    return dict(swept)


def _relative(row: RowSummary, reference: RowSummary | None) -> RowSummary:
    if reference is None:
        return row
    time = row.step_time / reference.step_time if row.step_time and reference.step_time else None
    return RowSummary(**{**vars(row), "flops": row.flops / reference.flops, "step_time": time})


def markdown_table(rows: list[RowSummary], reference: str) -> str:
    """The rows as a table for people; losses in nats per token."""
    base = next((row.loss for row in rows if row.row == reference), None)
    lines = [
        "| row | held-out loss | over the reference | best rate (loss at each) | FLOPs | step time | "
        "held-out density, worst layer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f" ± {row.spread:.3f} ({row.seeds} seeds)" if row.seeds > 1 else ""
        gap = "" if base is None else f"{row.loss - base:+.3f}"
        edge = "" if row.rate_inside else ", at the end of its range"
        sweep = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in row.sweep.items())
        time = "" if row.step_time is None else f"{row.step_time:.2f}"
        density = "" if row.density is None else f"{row.density:.3f}, off by {row.density_error or 0:.3f}"
        rates = f"{row.best.rate:g}{edge} ({sweep})"
        cells = [row.row, f"{row.loss:.3f}{spread}", gap, rates, f"{row.flops:.3f}", time, density]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[RowSummary], reference: str, out: Path) -> None:
    """Held-out loss against executed FLOPs, and against time where it was measured; the curves of the best
    trials whose records are in ``out``."""
    by_flops = {row.row: (row.flops, row.loss, row.spread) for row in rows}
    plot_tradeoff(by_flops, f"executed FLOPs over those of {reference}", out / "loss_by_flops.png")
    timed = {row.row: (row.step_time, row.loss, row.spread) for row in rows if row.step_time is not None}
    if timed:
        plot_tradeoff(timed, f"step time over that of {reference}", out / "loss_by_time.png")
    best = {row.row: out / row.best.name / "metrics.jsonl" for row in rows}
    recorded = {row: path for row, path in best.items() if path.is_file()}
    if recorded:
        plot_curves(recorded, out / "curves.png")
