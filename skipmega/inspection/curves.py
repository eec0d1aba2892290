"""The figure of one checkpoint's quality against what it computes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from skipmega.inspection.drawing import ACCENT, INK, MUTED, new_figure, save_figure, tidy

_COLOURS = (INK, ACCENT, MUTED)


def plot_density_curve(
    flops: Sequence[float],
    densities: Sequence[float],
    losses: Sequence[float],
    scores: Mapping[str, Sequence[float]],
    out_png: str | Path,
) -> None:
    """Held-out loss, and scores beside it, against executed operations.

    Args:
        flops: forward operations per token, as executed, one for each point.
        densities: that were asked for; written beside the points of the loss.
        losses: nats per token.
        scores: by name, one value for each point.
        out_png: where the figure goes, 1500 x 630 pixels.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    from matplotlib.ticker import EngFormatter

    figure = new_figure(10, 4.2)
    of_loss, of_scores = figure.subplots(1, 2)
    of_loss.plot(flops, losses, color=INK, marker="o", markersize=5)
    for density, at, loss in zip(densities, flops, losses, strict=True):
        label = of_loss.annotate(
            f"{density:g}", (at, loss), textcoords="offset points", xytext=(0, 8), ha="center"
        )
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    of_loss.margins(0.08, 0.1)
    of_loss.set_title("beside the points: the density asked for", fontsize=10, loc="left")
    of_loss.set_ylabel("held-out loss, nats/token")
    for number, (name, values) in enumerate(scores.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        of_scores.plot(flops, values, color=colour, marker="o", markersize=5, label=name)
    of_scores.set_ylabel("score")
    if scores:
        of_scores.legend(frameon=False, fontsize=8)
    for axes in (of_loss, of_scores):
        axes.set_xlabel("executed FLOPs per token (forward)")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        tidy(axes)
    save_figure(figure, out_png)
