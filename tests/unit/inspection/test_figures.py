"""Figures are drawn, of the promised size and not blank; texts keep their lines."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipmega.errors import DataError
from skipmega.inspection import plot_density, plot_tokens_depth, plot_training
from skipmega.inspection.figures import plot_tradeoff, spread_apart
from skipmega.inspection.textgrid import lay_out

pytest.importorskip("matplotlib")


def read_png(path: Path) -> np.ndarray:
    """The picture, [height, width, channels]."""
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG")
    picture = imread(path)
    assert picture.std() > 0.05  # not blank
    return picture


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """A run of 40 steps with three routed layers, resumed at step 20."""
    routed = {"routed_layers": [1, 2, 3]}
    records = [{"kind": "start", "step": 0, "attempt": 1}]
    for step in range(1, 41):
        if step == 21:
            records.append({"kind": "start", "step": 20, "attempt": 2})
        density = [0.5 + 0.3 / step, 0.4, 0.6 - 0.3 / step]
        progress = {"step": step, "tokens": step * 4096, "loss": 3 + 6 / step}
        records.append({"kind": "train", **progress, "density": density, **routed})
        if step % 10 == 0:
            loss = {"step": step, "loss": 3.2 + 6 / step}
            records.append({"kind": "eval", **loss, "density": density, **routed})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_training_figure(metrics, tmp_path):
    plot_training(metrics, tmp_path / "new" / "loss.png", unigram_entropy=6.5)
    assert read_png(tmp_path / "new" / "loss.png").shape == (825, 1350, 4)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["loss.png"]


def test_density_figure(metrics, tmp_path):
    plot_density(metrics, tmp_path / "density.png", target=0.5)
    height, width, _ = read_png(tmp_path / "density.png").shape
    assert (width, height) == (1500, 444)


def test_tradeoff_figure(tmp_path):
    plot_tradeoff({"dense": (1.0, 2.9, 0.02), "skip": (0.99, 2.9, 0.0)}, "FLOPs", tmp_path / "tradeoff.png")
    assert read_png(tmp_path / "tradeoff.png").shape == (900, 1200, 4)


@given(st.lists(st.integers(0, 100), max_size=12))
def test_labels_do_not_overlap(places):
    """In order, a gap apart, on average where they belong; those that are far from others stay."""
    moved = spread_apart(places, 4)
    order = sorted(range(len(places)), key=lambda i: (places[i], i))
    assert all(moved[b] - moved[a] > 4 - 1e-9 for a, b in pairwise(order))
    assert sum(moved) == pytest.approx(sum(places))
    for i, place in enumerate(places):
        if all(abs(place - other) >= 4 * len(places) for j, other in enumerate(places) if j != i):
            assert moved[i] == place


def test_density_of_a_dense_run_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "tokens": 8, "loss": 2.0}\n', encoding="utf-8")
    plot_training(path, tmp_path / "loss.png")  # one record is enough
    with pytest.raises(DataError, match="no routed layers"):
        plot_density(path, tmp_path / "density.png", target=0.5)


def test_depth_figure_grows_with_its_lines(tmp_path):
    heights = []
    for lines in (2, 12):
        tokens = ["def", " f", "(x):", "\n\treturn $x$", "\n"] * lines
        executed = np.arange(4 * len(tokens)).reshape(4, -1) % 3 > 0
        plot_tokens_depth(tokens, executed, tmp_path / "depth.png", columns=60)
        heights.append(read_png(tmp_path / "depth.png").shape[0])
    assert heights[1] - heights[0] == pytest.approx(20 * 0.19 * 150, abs=2)  # 20 more rows


def test_depth_figure_wants_a_column_per_token(tmp_path):
    for shape in ((4, 2), (0, 3), (3,)):
        with pytest.raises(DataError, match="for 3 tokens"):
            plot_tokens_depth(["a", "b", "c"], np.zeros(shape, dtype=bool), tmp_path / "depth.png")


def test_layout_breaks_lines_where_the_text_and_the_page_do():
    grid = lay_out(["ab", "cde\r\n", "", "\n", "\tx\x07"], columns=4)
    rows = [["."] * 4 for _ in range(grid.num_rows)]
    for cell in grid.cells:
        rows[cell.row][cell.column] = cell.character
    assert ["".join(row) for row in rows] == ["abcd", "e↵..", "↵...", "    ", "x·.."]
    assert [cell.token for cell in grid.cells] == [0, 0, 1, 1, 1, 1, 3, 4, 4, 4, 4, 4, 4]
