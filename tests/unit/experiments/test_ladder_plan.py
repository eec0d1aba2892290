"""A ladder's rows, and which of their runs come next."""

from pathlib import Path

import pytest

from skipmega.errors import ConfigError
from skipmega.experiments.plan import LadderPlan, Trial, best_trial, load_plan, next_trials, row_config

ROOT = Path(__file__).resolve().parents[3]
PLAN = LadderPlan(
    base="base.yaml", reference="a", rates=[1.0, 2.0, 4.0], extensions=2, seeds=[7, 8, 9], rows={"a": []}
)


def losses_of(by_rate: dict[float, float | None]) -> dict[Trial, float | None]:
    return {Trial("a", rate, 7): loss for rate, loss in by_rate.items()}


def rates_next(by_rate: dict[float, float | None]) -> list[tuple[float, int]]:
    return [(trial.rate, trial.seed) for trial in next_trials(PLAN, "a", losses_of(by_rate))]


def test_every_rate_is_tried_with_the_first_seed() -> None:
    assert rates_next({}) == [(1.0, 7), (2.0, 7), (4.0, 7)]
    assert rates_next({1.0: None, 2.0: 3.0}) == [(4.0, 7)]


def test_nothing_follows_while_the_sweep_runs() -> None:
    assert rates_next({1.0: 3.0, 2.0: 2.9, 4.0: None}) == []


def test_the_best_rate_inside_is_repeated_with_the_other_seeds() -> None:
    swept = losses_of({1.0: 3.0, 2.0: 2.9, 4.0: 3.1})
    assert next_trials(PLAN, "a", swept) == [Trial("a", 2.0, 8), Trial("a", 2.0, 9)]
    assert next_trials(PLAN, "a", {**swept, Trial("a", 2.0, 8): None}) == [Trial("a", 2.0, 9)]


def test_a_best_rate_at_an_end_extends_the_range() -> None:
    assert rates_next({1.0: 2.8, 2.0: 2.9, 4.0: 3.1}) == [(0.5, 7)]
    assert rates_next({1.0: 3.3, 2.0: 3.2, 4.0: 3.1}) == [(8.0, 7)]
    assert rates_next({1.0: 3.3, 2.0: 3.2, 4.0: 3.1, 8.0: 3.0}) == [(16.0, 7)]
    assert rates_next({1.0: 3.3, 2.0: 3.2, 4.0: 3.1, 8.0: 3.4}) == [(4.0, 8), (4.0, 9)]


def test_the_range_grows_only_so_far() -> None:
    found = {1.0: 3.3, 2.0: 3.2, 4.0: 3.1, 8.0: 3.0, 16.0: 2.9}
    assert rates_next(found) == [(16.0, 8), (16.0, 9)]


def test_a_diverged_rate_is_no_best_one() -> None:
    found = losses_of({1.0: 3.3, 2.0: 3.2, 4.0: float("inf")})
    assert best_trial(PLAN, "a", found) == Trial("a", 2.0, 7)


def test_rows_build_on_earlier_ones() -> None:
    plan = LadderPlan(
        base="b", reference="a", rates=[1.0, 2.0, 3.0], seeds=[1],
        rows={"a": ["x.y=1"], "b": ["a", "x.z=2"], "c": ["b", "x.y=3"]},
    )  # fmt: skip
    assert plan.overrides("c") == ["x.y=1", "x.z=2", "x.y=3"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("reference: nowhere", "reference=nowhere is not one of the rows: a"),
        ("rates: [2.0, 1.0, 3.0]", "must rise"),
        ("rates: [1.0, 2.0]", "rates"),
        ("rows: {a: [b], b: []}", "row a: 'b' is no section.field=value and no row before this one"),
        ("rows: {a: ['model.no_such=1']}", "no such field"),
        ("whatever: 1", "whatever"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path: Path, changes: str, said: str) -> None:
    (tmp_path / "base.yaml").write_text("model: {num_layers: 2}\n")
    fields = {
        "base": "base.yaml",
        "reference": "a",
        "rates": "[1.0, 2.0, 4.0]",
        "seeds": "[1]",
        "rows": "{a: []}",
    }
    name, _, value = changes.partition(": ")
    text = "\n".join(f"{key}: {entry}" for key, entry in {**fields, name: value}.items())
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_plan(tmp_path / "plan.yaml")
    assert said in str(error.value)


def test_an_absent_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_plan(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("name", ["routers", "gradients", "longer", "densities"])
def test_the_ladders_that_are_shipped(name: str) -> None:
    from skipmega.models.flops import forward_flops_per_token, target_shares

    path = ROOT / f"pretrain/configs/ladder/{name}.yaml"
    plan = load_plan(path)
    flops = {}
    for row in plan.rows:
        config = row_config(path, plan, row, "model.vocab_size=16384")
        flops[row] = forward_flops_per_token(config, target_shares(config))
    for row, found in flops.items():
        if row != "dense-12" and not row.endswith("dense"):
            assert found == pytest.approx(flops[plan.reference], rel=0.01), row
