"""Figures of a run, as PNG files: the loss, the density of each layer, the depth of each token."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipmega.errors import DataError
from skipmega.inspection.drawing import ACCENT, INK, MUTED, TARGET, new_figure, save_figure, tidy
from skipmega.inspection.metrics import RunMetrics, read_metrics
from skipmega.inspection.textgrid import TextGrid, lay_out

_FINAL_RECORDS = 10


def plot_training(
    metrics_path: str | Path, out_png: str | Path, unigram_entropy: float | None = None
) -> None:
    """Training and held-out loss over steps (below) and tokens (above).

    The thin line is the training loss as logged, the bold one its running mean over 4% of the records.
    Dotted lines mark where the run was resumed.

    Args:
        metrics_path: a run's metrics.jsonl.
        out_png: where the figure goes, 1350 x 825 pixels.
        unigram_entropy: nats/token, drawn as a dashed line.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: there is nothing to draw.
    """
    metrics = read_metrics(metrics_path)
    figure = new_figure(9, 5.5)
    axes = figure.add_subplot()
    steps = [record["step"] for record in metrics.train]
    losses = [record["loss"] for record in metrics.train]
    axes.plot(steps, losses, color=INK, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(losses), color=INK, linewidth=1.8, label="training")
    if metrics.evaluations:
        axes.plot(
            [record["step"] for record in metrics.evaluations],
            [record["loss"] for record in metrics.evaluations],
            color=ACCENT,
            marker="o",
            markersize=4,
            linewidth=1.2,
            label=f"held out (last {metrics.evaluations[-1]['loss']:.3f})",
        )
    if unigram_entropy is not None:
        axes.axhline(
            unigram_entropy,
            color=TARGET,
            linestyle="--",
            linewidth=1.2,
            label=f"unigram entropy ({unigram_entropy:.3f})",
        )
    for step in metrics.resumed_at:
        axes.axvline(step, color=MUTED, linestyle=":", linewidth=1.2)
    if metrics.resumed_at:
        at = ", ".join(str(step) for step in metrics.resumed_at[-3:])
        more = "… " if len(metrics.resumed_at) > 3 else ""
        axes.plot([], [], color=MUTED, linestyle=":", linewidth=1.2, label=f"resumed at {more}{at}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats/token)")
    axes.set_xlim(0, 1.01 * max(steps))
    _add_token_axis(axes, metrics)
    tidy(axes)
    axes.legend(frameon=False)
    save_figure(figure, out_png)


def plot_density(metrics_path: str | Path, out_png: str | Path, target: float) -> None:
    """The share of tokens that each routed layer executed: over training, and at the end.

    Args:
        metrics_path: a run's metrics.jsonl.
        out_png: where the figure goes, 1500 pixels wide.
        target: the density asked for, 0 to 1, drawn as a line.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: the run has no routed layers, or there is nothing to draw.
    """
    metrics = read_metrics(metrics_path)
    routed = metrics.routed()
    if not routed:
        raise DataError(f"{metrics_path} tells no density: the run has no routed layers")
    layers = [str(layer) for layer in routed[-1]["routed_layers"]]
    density = np.array([record["density"] for record in routed], dtype=np.float64).T
    edges = np.array([0, *(record["step"] for record in routed)], dtype=np.float64)
    figure = new_figure(10, 2.0 + 0.32 * len(layers))
    over_steps, at_end = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1.3])
    rows = np.arange(len(layers) + 1) - 0.5
    shares = over_steps.pcolormesh(edges, rows, density, cmap="viridis", vmin=0, vmax=1)
    over_steps.set_xlabel("step")
    over_steps.set_ylabel("layer")
    over_steps.set_yticks(range(len(layers)), layers)
    over_steps.set_title("executed share in training", fontsize=10)
    bar = figure.colorbar(shares, ax=over_steps, pad=0.02)
    bar.ax.axhline(target, color=TARGET, linewidth=2)
    bar.outline.set_visible(False)
    _draw_final_density(at_end, metrics, density, target)
    figure.legend(frameon=False, fontsize=9, ncols=3, loc="outside lower right")
    save_figure(figure, out_png)


def plot_tokens_depth(
    tokens: Sequence[str], executed: NDArray[np.bool_], out_png: str | Path, columns: int = 100
) -> None:
    """A text whose tokens are coloured by the number of layers that they executed.

    Args:
        tokens: the text of each token; line ends in it break the line.
        executed: bool [layers, tokens], whether a layer ran for a token.
        out_png: where the figure goes; its height follows the text.
        columns: characters in a line, 1 or more.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: ``executed`` does not fit ``tokens``, or there are none.
    """
    if executed.ndim != 2 or executed.shape[1] != len(tokens) or not executed.size:
        raise DataError(
            f"executed is of shape {list(executed.shape)} for {len(tokens)} tokens: it must be "
            "[layers, tokens] with at least one of each"
        )
    depths = executed.sum(axis=0)
    grid = lay_out(tokens, columns)
    figure = new_figure(0.082 * columns + 1.2, 0.19 * grid.num_rows + 0.5)
    axes = figure.add_subplot()
    mesh = _draw_text(axes, grid, depths, executed.shape[0])
    axes.set_title(
        f"layers executed per token: mean {depths.mean():.2f} of {executed.shape[0]}",
        fontsize=10,
        loc="left",
    )
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=max(4, grid.num_rows), fraction=0.03)
    bar.outline.set_visible(False)
    bar.locator = _whole_numbers()
    save_figure(figure, out_png)


def plot_curves(metrics: Mapping[str, Path], out_png: str | Path) -> None:
    """Training loss of several runs over tokens (running mean over 4% of each one's records).

    Args:
        metrics: each run's metrics.jsonl by the name to show.
        out_png: where the figure goes, 1350 x 900 pixels.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: a run has no record of training.
    """
    from matplotlib.ticker import EngFormatter

    figure = new_figure(9, 6)
    axes = figure.add_subplot()
    for name, path in metrics.items():
        train = read_metrics(path).train
        losses = _smooth([record["loss"] for record in train])
        axes.plot([record["tokens"] for record in train], losses, linewidth=1.3, label=name)
    axes.set_xlabel("tokens")
    axes.set_ylabel("training loss, nats/token")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    save_figure(figure, out_png)


def plot_tradeoff(
    points: Mapping[str, tuple[float, float, float]], x_label: str, out_png: str | Path
) -> None:
    """Held-out loss of several models against what they cost.

    Args:
        points: by name, cost, loss in nats per token and the loss's half-spread.
        x_label: what the cost is.
        out_png: where the figure goes, 1200 x 900 pixels.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = new_figure(8, 6)
    axes = figure.add_subplot()
    for cost, loss, spread in points.values():
        axes.errorbar(cost, loss, yerr=spread, fmt="o", color=INK, markersize=5, capsize=3, linewidth=1)
    low, high = axes.get_ylim()
    heights = spread_apart([(loss - low) / (high - low) for _, loss, _ in points.values()], 0.035)
    for (name, (cost, loss, _)), height in zip(points.items(), heights, strict=True):
        axes.annotate(
            name, (cost, loss), xytext=(1.03, height), textcoords="axes fraction", va="center", fontsize=8,
            color=ACCENT, arrowprops={"arrowstyle": "-", "color": ACCENT, "linewidth": 0.4, "alpha": 0.6},
        )  # fmt: skip
    axes.set_xlabel(x_label)
    axes.set_ylabel("held-out loss, nats/token")
    tidy(axes)
    save_figure(figure, out_png)


def spread_apart(places: Sequence[float], gap: float) -> list[float]:
    """The same places in the same order, moved as little as need be for neighbours to be ``gap`` apart.

    Those that would overlap become a block around their mean place.
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    blocks: list[list[int]] = []
    starts: list[float] = []
    for index in order:
        blocks.append([index])
        starts.append(places[index])
        while len(blocks) > 1 and starts[-1] < starts[-2] + gap * len(blocks[-2]):
            last = blocks.pop()
            starts.pop()
            blocks[-1] += last
            middle = sum(places[i] for i in blocks[-1]) / len(blocks[-1])
            starts[-1] = middle - gap * (len(blocks[-1]) - 1) / 2
    found = [0.0] * len(places)
    for block, start in zip(blocks, starts, strict=True):
        for number, index in enumerate(block):
            found[index] = start + gap * number
    return found


def _draw_final_density(axes: Any, metrics: RunMetrics, density: NDArray[np.float64], target: float) -> None:
    """Bars of the last densities in training and, if there is one, of the last evaluation."""
    rows = np.arange(density.shape[0])
    final = {"training": (density[:, -_FINAL_RECORDS:].mean(axis=1), INK)}
    if metrics.evaluations and len(metrics.evaluations[-1].get("density") or ()) == len(rows):
        final["held out"] = (np.array(metrics.evaluations[-1]["density"]), ACCENT)
    height = 0.8 / len(final)
    for place, (label, (values, colour)) in enumerate(final.items()):
        shift = (place - (len(final) - 1) / 2) * height
        axes.barh(rows - shift, values, height=height, color=colour, label=f"{label} {values.mean():.3f}")
    axes.axvline(target, color=TARGET, linestyle="--", linewidth=1.2, label=f"target {target:g}")
    axes.set_xlim(0, 1)
    axes.set_xlabel("executed share")
    axes.set_title("at the end", fontsize=10)
    tidy(axes)


def _draw_text(axes: Any, grid: TextGrid, depths: NDArray[np.int64], num_layers: int) -> Any:
    """Characters over cells coloured by their token's depth; the mesh, for a colour bar."""
    cells = np.full((grid.num_rows, grid.columns), np.nan)
    for cell in grid.cells:
        cells[cell.row, cell.column] = depths[cell.token]
    mesh = axes.pcolormesh(cells, cmap="YlGnBu", vmin=0, vmax=num_layers)
    for cell in grid.cells:
        if not cell.character.isspace():
            dark = depths[cell.token] > 0.6 * num_layers
            axes.text(
                cell.column + 0.5,
                cell.row + 0.54,
                cell.character,
                color="white" if dark else "black",
                family="monospace",
                fontsize=9,
                ha="center",
                va="center",
                parse_math=False,
            )
    axes.invert_yaxis()
    axes.set_axis_off()
    return mesh


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred running mean; the window shrinks towards both ends, so that it lags nowhere."""
    reach = len(values) // 50
    sums = np.concatenate([[0.0], np.cumsum(values)])
    smoothed = []
    for place in range(len(values)):
        half = min(reach, place, len(values) - 1 - place)
        smoothed.append(float(sums[place + half + 1] - sums[place - half]) / (2 * half + 1))
    return smoothed


def _add_token_axis(axes: Any, metrics: RunMetrics) -> None:
    from matplotlib.ticker import EngFormatter

    last = metrics.train[-1]
    tokens_per_step = last["tokens"] / last["step"]
    top = axes.secondary_xaxis(
        "top", functions=(lambda step: step * tokens_per_step, lambda tokens: tokens / tokens_per_step)
    )
    top.set_xlabel("tokens")
    top.xaxis.set_major_formatter(EngFormatter(sep=""))
    top.spines["top"].set_visible(False)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)
