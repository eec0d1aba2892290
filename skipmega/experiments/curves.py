"""Whether runs that should learn alike do: their losses side by side, as Markdown."""

from collections.abc import Mapping
from pathlib import Path

from skipmega.errors import DataError
from skipmega.inspection.metrics import RunMetrics, read_metrics


def window_losses(metrics: RunMetrics, steps: int) -> dict[int, float]:
    """Mean training loss of every ``steps`` steps, by a window's last step; unfinished ones are left out."""
    windows: dict[int, list[float]] = {}
    for record in metrics.train:
        windows.setdefault(-(-record["step"] // steps) * steps, []).append(record["loss"])
    last = metrics.train[-1]["step"]
    return {end: sum(losses) / len(losses) for end, losses in windows.items() if end <= last}


def curve_table(runs: Mapping[str, Path], reference: str, steps: int) -> str:
    """Losses of every ``steps`` steps, their largest distance from those of ``reference``, and the least and
    greatest density of a routed layer in the last record.

    Args:
        runs: each run's metrics.jsonl by its name.
        reference: one of them.
        steps: a multiple of each run's ``logging.interval``.

    Raises:
        DataError: a run has no record of training, or the runs are not of the same steps.
    """
    metrics = {name: read_metrics(path) for name, path in runs.items()}
    losses = {name: window_losses(run, steps) for name, run in metrics.items()}
    ends = list(losses[reference])
    if other := [name for name, found in losses.items() if list(found) != ends]:
        raise DataError(
            f"{', '.join(other)}: not of the same steps as {reference}: rerun what was ended early"
        )
    head = ["loss after steps", *map(str, ends), "largest distance", "densities"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, found in losses.items():
        far = max((abs(found[end] - losses[reference][end]) for end in ends), default=0.0)
        record = metrics[name].train[-1]
        densities = record["density"]
        told = f"{min(densities):.3f}-{max(densities):.3f}" if densities else ""
        cells = [name, *(f"{found[end]:.4f}" for end in ends), f"{far:.4f}", told]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
