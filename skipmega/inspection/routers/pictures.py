"""The findings as PNG files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipmega.inspection.drawing import ACCENT, INK, MUTED, new_figure, save_figure, tidy
from skipmega.inspection.figures import plot_tokens_depth
from skipmega.inspection.routers.findings import Findings

_TITLES = {
    "kind": "kind of token",
    "position": "position in the sequence",
    "source": "source",
    "loss": "loss of predicting the next token (nats)",
    "surprise": "surprise of the token (nats)",
    "frequency": "occurrences of the token",
}
_SHOWN_TOKENS = 500
_MOST_NUMBERS = 240  # cells of a matrix beyond which numbers are left out
_BAND = "#cfd6dc"


def write_pictures(
    findings: Findings, tokens: Sequence[str], executed: NDArray[np.bool_], out_dir: Path
) -> None:
    """Write text.png, density_by_*.png, depth.png, agreement.png and rank_correlation.png.

    Args:
        findings: of :func:`skipmega.inspection.routers.findings.find_out`.
        tokens: the text of each token of which a beginning is shown.
        executed: bool [routed layers, tokens].
        out_dir: exists.
    """
    plot_tokens_depth(tokens[:_SHOWN_TOKENS], executed[:, :_SHOWN_TOKENS], out_dir / "text.png")
    for name, figure in _figures(findings):
        save_figure(figure, out_dir / f"{name}.png")


def _figures(findings: Findings) -> Iterator[tuple[str, Any]]:
    for name, groups in findings["groupings"].items():
        if len(groups) > 1:
            yield f"density_by_{name}", _densities(findings, groups, _TITLES[name])
    yield "depth", _depths(findings)
    yield "agreement", _agreement(findings)
    yield "rank_correlation", _rank_correlations(findings)


def _densities(findings: Findings, groups: list[dict[str, Any]], title: str) -> Any:
    """Left each layer's density in each group, right the mean depth over the band of a random gate."""
    layers = [str(layer) for layer in findings["model"]["routed_layers"]]
    labels = [f"{group['label']}  ({group['tokens']:,})" for group in groups]
    figure = new_figure(6.2 + 0.42 * min(len(layers), 24), 1.4 + 0.3 * len(groups))
    each, depth = figure.subplots(1, 2, sharey=True, width_ratios=[0.5 * min(len(layers), 24), 3.4])
    percent = 100 * np.array([group["density"] for group in groups])
    mesh = each.pcolormesh(percent, cmap="YlGnBu", vmin=0, vmax=100, edgecolors="white", linewidth=0.5)
    _write_numbers(each, percent, "{:.0f}", percent > 60)
    _label_cells(each, layers, labels)
    each.set_xlabel("layer")
    each.set_title("percent of the group's tokens", fontsize=10, loc="left")
    figure.colorbar(mesh, ax=each, pad=0.01, fraction=0.04).outline.set_visible(False)
    rows = np.arange(len(groups)) + 0.5
    bands = np.array([group["random_depth"] for group in groups])
    depth.barh(rows, bands[:, 1] - bands[:, 0], 0.55, bands[:, 0], color=_BAND, label="random gate, 95%")
    depth.plot([group["depth"] for group in groups], rows, "o", color=ACCENT, label="routers")
    depth.set_title("layers per token", fontsize=10, loc="left")
    tidy(depth)
    depth.tick_params(left=False)
    figure.suptitle(f"Density by {title}", x=0.01, ha="left", fontsize=11)
    figure.legend(frameon=False, fontsize=8, ncols=2, loc="outside lower right")
    return figure


def _depths(findings: Findings) -> Any:
    figure = new_figure(7, 3.6)
    axes = figure.add_subplot()
    depths = np.arange(len(findings["depth"]["share"]))
    axes.bar(depths, findings["depth"]["share"], 0.8, color=INK, label="routers")
    axes.step(
        np.append(depths - 0.5, depths[-1] + 0.5),
        [*findings["depth"]["random"], findings["depth"]["random"][-1]],
        where="post",
        color=ACCENT,
        label="random gate",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("routed layers executed")
    axes.set_ylabel("share of tokens")
    tidy(axes)
    axes.legend(frameon=False)
    return figure


def _agreement(findings: Findings) -> Any:
    layers = [str(layer) for layer in findings["model"]["routed_layers"]]
    correlation = np.array(findings["agreement"]["correlation"], dtype=np.float64)
    np.fill_diagonal(correlation, np.nan)
    size = 2.2 + 0.45 * min(len(layers), 24)
    figure = new_figure(size + 0.9, size)
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(correlation, cmap="PuOr", vmin=-1, vmax=1, edgecolors="white", linewidth=0.5)
    _write_numbers(axes, correlation, "{:.2f}", np.abs(correlation) > 0.7)
    _label_cells(axes, layers, layers)
    axes.set_xlabel("layer")
    axes.set_ylabel("layer")
    axes.set_title("correlation of decisions", fontsize=10, loc="left")
    figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.05).outline.set_visible(False)
    return figure


def _rank_correlations(findings: Findings) -> Any:
    found = findings["rank_correlation"]
    figure = new_figure(7, 2.6)
    axes = figure.add_subplot()
    axes.axvspan(*found["random"], color=_BAND, label="random gate, 95%")
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for row, entry in enumerate(found["with"].values()):
        if entry["interval"] is not None:
            axes.plot(entry["interval"], [row, row], color=ACCENT, linewidth=2)
        if entry["rho"] is not None:
            axes.plot(entry["rho"], row, "o", color=ACCENT)
    axes.set_yticks(range(len(found["with"])), list(found["with"]))
    axes.set_ylim(len(found["with"]) - 0.5, -0.5)
    axes.set_xlabel("rank correlation with depth")
    tidy(axes)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _label_cells(axes: Any, columns: Sequence[str], rows: Sequence[str]) -> None:
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write_numbers(axes: Any, values: NDArray[np.float64], style: str, dark: NDArray[np.bool_]) -> None:
    if values.size > _MOST_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if dark[row, column] else "black"
            axes.text(
                column + 0.5,
                row + 0.5,
                style.format(value),
                color=colour,
                fontsize=8,
                ha="center",
                va="center",
            )
