"""The page, opened as a file in a real browser: what it shows, what it answers, and who can read it."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_model import HOSTILE, NOTES, DigitModel
from torch import Tensor

from skipmega.inspection.routers import inspect_routers, open_subject

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
COLOUR = "node => getComputedStyle(node).backgroundColor"
# each token with text to read: its text, and its colours as [r, g, b]
COLOURS = """nodes => nodes.filter(node => node.textContent.trim()).map(node => {
    const style = getComputedStyle(node);
    const rgb = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
    return [rgb(style.color), rgb(style.backgroundColor)];
})"""


class Page:
    """The inspected digits in a tab of the browser, and what went wrong there."""

    def __init__(self, tab: Any, folder: Path) -> None:
        self.tab = tab
        self.complaints: list[str] = []
        self.requests: list[str] = []
        tab.on("console", lambda message: self.complaints.append(message.text))
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.on("request", lambda request: self.requests.append(request.url))
        tab.goto((folder / "index.html").as_uri())
        self.tokens = tab.locator("#text span")
        self.tip = tab.locator("#tooltip")

    def choose(self, name: str, label: str) -> None:
        self.tab.locator(
            f"label:has(input[name={name}])", has_text=re.compile(f"^{re.escape(label)}$")
        ).click()

    def executed(self) -> list[int]:
        found: list[str] = self.tokens.evaluate_all("nodes => nodes.map(node => node.dataset.executed)")
        return [int(number) for number in found]

    def digits(self) -> list[bool]:
        return [text.strip().isdigit() for text in self.tokens.all_text_contents()]


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, inspected: Path) -> Iterator[Page]:
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1100, "height": 800})
    context.set_default_timeout(20_000)
    page = Page(context.new_page(), inspected)
    yield page
    title = page.tab.title()
    context.close()
    assert title.startswith("Routers of")
    assert page.complaints == []
    assert len(page.requests) == 1  # the page itself: nothing is fetched


def test_digits_are_told_from_others(page: Page) -> None:
    digits = page.digits()
    assert len(digits) == 250
    assert 20 < sum(digits) < 125
    assert page.executed() == [2 if digit else 1 for digit in digits]
    seen = {}
    for layer, expected in (("1", digits), ("2", [not digit for digit in digits]), ("3", digits)):
        page.choose("layer", layer)
        assert page.executed() == [int(ran) for ran in expected]
        of_digit, of_other = (page.tokens.nth(digits.index(kind)).evaluate(COLOUR) for kind in (True, False))
        assert of_digit != of_other
        seen[layer] = (of_digit, of_other)
    assert seen["1"] == seen["3"] == seen["2"][::-1]
    page.choose("layer", "all")
    assert page.tokens.nth(digits.index(True)).evaluate(COLOUR) not in seen["1"]


def test_a_random_gate_knows_no_digits(page: Page) -> None:
    page.choose("gate", "a random gate")
    page.choose("layer", "1")
    executed, digits = page.executed(), page.digits()
    among_digits = [ran for ran, digit in zip(executed, digits, strict=True) if digit]
    assert 0 < sum(among_digits) < len(among_digits)
    page.choose("gate", "the model")
    assert page.executed() == [int(digit) for digit in digits]


def test_pointing_at_a_token_tells_of_it(page: Page) -> None:
    assert page.tip.is_hidden()
    page.tokens.nth(page.digits().index(True)).hover()
    assert page.tip.is_visible()
    told = page.tip.inner_text()
    assert "number" in told
    assert "executes 2 of 3 routed layers" in told
    assert re.search(r"loss \d+\.\d\d nats.*surprise \d+\.\d\d nats", told, re.DOTALL)
    assert page.tip.locator(".ran").all_inner_texts() == ["1", "3"]
    page.tab.locator("h1").hover()
    assert page.tip.is_hidden()


def test_the_keyboard_does_what_a_pointer_does(page: Page) -> None:
    page.tokens.first.focus()
    focused = page.tab.locator("#text span:focus")

    def place() -> int:
        return int(focused.get_attribute("data-item"))

    assert page.tip.is_visible()
    assert focused.get_attribute("aria-describedby") == "tooltip"
    for key, expected in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 249), ("Home", 0)):
        page.tab.keyboard.press(key)
        assert place() == expected
    page.tab.keyboard.press("ArrowDown")
    boxes = [page.tokens.nth(at).bounding_box() for at in (0, place())]
    assert boxes[1]["y"] > boxes[0]["y"]
    page.tab.keyboard.press("ArrowUp")
    assert place() == 0
    page.tab.keyboard.press("Escape")
    assert page.tip.is_hidden()
    page.tab.locator("input[name=layer]").first.focus()  # arrows choose the layer, as in any group of choices
    page.tab.keyboard.press("ArrowRight")
    assert set(page.executed()) == {0, 1}


def test_tables_have_the_numbers_of_the_json(page: Page, inspected: Path) -> None:
    findings = json.loads((inspected / "inspection.json").read_text())
    for name, groups in findings["groupings"].items():
        rows = page.tab.locator(f"table[data-grouping={name}] tbody tr")
        assert rows.count() == len(groups)
        for row, group in zip(rows.all(), groups, strict=True):
            assert row.locator("th").inner_text() == group["label"]
            assert row.locator("td.tokens").inner_text() == f"{group['tokens']:,}"
            shown = [int(cell) for cell in row.locator("td.cell").all_inner_texts()]
            assert shown == pytest.approx([100 * share for share in group["density"]], abs=0.51)
    number = page.tab.locator("table[data-grouping=kind] tr", has_text="number").locator("td.cell")
    assert number.all_inner_texts() == ["100", "0", "100"]
    page.choose("measure", "difference from a random gate")
    assert [text[0] for text in number.all_inner_texts()] == ["+", MINUS, "+"]
    number.first.hover()
    assert re.search(
        r"number, layer 1: 100.0% of \d+ tokens; a random gate gives [\d.]+% to [\d.]+%",
        page.tip.inner_text(),
    )
    agreement = page.tab.locator("#agreement td.cell").all_inner_texts()
    assert agreement == [
        "",
        f"{MINUS}1.00",
        "1.00",
        f"{MINUS}1.00",
        "",
        f"{MINUS}1.00",
        "1.00",
        f"{MINUS}1.00",
        "",
    ]
    rho = page.tab.locator("#correlations tbody td:nth-child(3)").all_inner_texts()
    found = findings["rank_correlation"]["with"].values()
    assert [float(text.replace(MINUS, "-")) for text in rho] == pytest.approx(
        [one["rho"] for one in found], abs=6e-4
    )


def test_another_source_is_shown_as_it_is_written(page: Page) -> None:
    page.choose("source", NOTES)
    shown = re.sub("[↵⇥·]", "", page.tab.locator("#text").text_content())
    assert HOSTILE in shown
    assert page.tab.locator("main b").count() == 0
    page.choose("source", "years")
    assert page.tokens.count() == 250


@pytest.mark.parametrize("width", [360, 1600])
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    page.tab.set_viewport_size({"width": width, "height": 700})
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= width


def test_text_can_be_read_on_every_colour(page: Page) -> None:
    """Contrasts as WCAG counts them, and a scale that is one of lightness, which no eye confuses."""
    for layer in ("all", "1"):
        page.choose("layer", layer)
        found = page.tokens.evaluate_all(COLOURS) + page.tab.locator("td.cell").evaluate_all(COLOURS)
        assert len({tuple(paper) for _, paper in found}) >= 2
        assert min(contrast(ink, paper) for ink, paper in found) >= 4.5
    page.choose("layer", "all")
    scale = [luminance(paper) for _, paper in page.tab.locator("#legend li").evaluate_all(COLOURS)]
    assert len(scale) == 4
    steps = [after - before for before, after in pairwise(scale)]
    assert all(step > 0.03 for step in steps) or all(step < -0.03 for step in steps)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_depths_of_all_groupings_are_drawn_on_one_scale(page: Page, inspected: Path) -> None:
    found = json.loads((inspected / "inspection.json").read_text())["groupings"].values()
    shown = [
        depth
        for groups in found
        if len(groups) > 1
        for group in groups
        for depth in (group["depth"], *group["random_depth"])
    ]
    ends = [f"{end:.2f}" for end in (min(shown), max(shown))]
    scales = page.tab.locator("#groups .scale").evaluate_all(
        "nodes => nodes.map(node => [...node.children].map(end => end.textContent))"
    )
    assert len(scales) > 2
    assert scales == [ends] * len(scales)


def test_routers_of_one_mind_have_a_page_too(browser: Any, digit_model: DigitModel, tmp_path: Path) -> None:
    """Where nothing varies, correlations are not defined: null in the JSON, a dash on the page."""
    (tmp_path / "text.txt").write_text("10 trees. " * 60)

    def everybody(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(tokens.shape), torch.ones(3, *tokens.shape, dtype=torch.bool)

    with open_subject(digit_model.export) as subject:
        found = inspect_routers(
            replace(subject, trace=everybody), {"text": tmp_path / "text.txt"}, tmp_path,
            max_tokens=999, shown_tokens=99, show_progress=False,
        )  # fmt: skip
    assert found["agreement"]["correlation"] == [[None] * 3] * 3
    assert found["rank_correlation"]["sampled"] == "sequence"
    assert {(one["rho"], one["interval"]) for one in found["rank_correlation"]["with"].values()} == {
        (None, None)
    }
    page = Page(browser.new_page(), tmp_path)
    assert set(page.executed()) == {3}
    assert set(page.tab.locator("#agreement td.cell").all_inner_texts()) == {"", DASH}
    assert page.tab.locator("#correlations tbody td:nth-child(3)").all_inner_texts() == [DASH] * 3
    page.tab.close()
    assert page.complaints == []


def luminance(rgb: list[float]) -> float:
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (c / 255 for c in rgb)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: list[float], second: list[float]) -> float:
    dark, light = sorted([luminance(first), luminance(second)])
    return (light + 0.05) / (dark + 0.05)
