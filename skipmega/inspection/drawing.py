"""What all figures share: an empty one, quiet axes, colours, and the way to a file."""

import importlib.util
from pathlib import Path
from typing import Any

from skipmega.data.files import atomic_write
from skipmega.errors import ConfigError

INK, ACCENT, MUTED, TARGET = "#1f3b57", "#d1661c", "#8b98a5", "#b3203a"
_DOTS_PER_INCH = 150


def check_matplotlib() -> None:
    """Refuse (ConfigError) to draw without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("figures need matplotlib, which is not installed: pip install 'skipmega[report]'")


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, outside of pyplot and its global state."""
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")


def tidy(axes: Any) -> None:
    """A faint grid, and no frame on the right and at the top."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save_figure(figure: Any, out_png: str | Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_write(Path(out_png)) as stream:
        figure.savefig(stream, format="png")
