"""The statistics of an inspection against scipy, brute force, and the coins they speak of."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

scipy_stats = pytest.importorskip("scipy.stats")

from skipmega.inspection.routers import statistics  # noqa: E402 - it needs scipy
from skipmega.inspection.routers.statistics import Ranking  # noqa: E402

# few values, as depths and frequencies have: ties are the rule
SMALL = st.integers(2, 12).flatmap(
    lambda n: st.tuples(
        arrays(np.int64, n, elements=st.integers(0, 4)),
        arrays(np.float64, n, elements=st.integers(-3, 3).map(lambda i: i / 2)),
        arrays(np.int64, n, elements=st.integers(0, 3)),
    )
)
DENSITIES = arrays(np.float64, st.integers(1, 6), elements=st.floats(0, 1))


@given(SMALL)
def test_rank_correlation_is_spearmans_of_values_repeated(sample) -> None:
    depth, other, times = sample
    repeated = np.repeat(depth, times), np.repeat(other, times)
    assume(all(len(np.unique(values)) > 1 for values in repeated))
    found = statistics.rank_correlation(Ranking(depth), {"other": Ranking(other)}, times.astype(float))
    assert found["other"] == pytest.approx(scipy_stats.spearmanr(*repeated).statistic, abs=1e-9)


@pytest.mark.parametrize("constant", [0, 1])
def test_what_does_not_vary_correlates_with_nothing(constant: int) -> None:
    values = [Ranking(np.arange(5)), Ranking(np.arange(5))]
    values[constant] = Ranking(np.full(5, 3))
    found = statistics.rank_correlation(values[0], {"other": values[1]}, np.ones(5))
    assert np.isnan(found["other"])


def test_intervals_are_those_of_samples_of_whole_units() -> None:
    """Against the plain way: pick units, put their values in a row, ask scipy."""
    generator = np.random.default_rng(5)
    unit = np.repeat(np.arange(12), generator.integers(1, 9, size=12))
    depth = generator.integers(0, 4, size=len(unit))
    other = depth + generator.normal(size=len(unit)) * 2 + unit % 3
    ranked = Ranking(depth), {"other": Ranking(other)}
    found = statistics.bootstrap(lambda w: statistics.rank_correlation(*ranked, w), unit, 200, seed=7)

    draws, expected = np.random.default_rng(7), []
    for _ in range(200):
        rows = np.concatenate([np.flatnonzero(unit == drawn) for drawn in draws.integers(12, size=12)])
        expected.append(scipy_stats.spearmanr(depth[rows], other[rows]).statistic)
    assert found["other"] == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])), abs=1e-9)
    again = statistics.bootstrap(lambda w: statistics.rank_correlation(*ranked, w), unit, 200, seed=8)
    assert again != found


@given(DENSITIES)
def test_depths_of_coins_are_counted_out(density) -> None:
    expected = np.zeros(len(density) + 1)
    for outcome in itertools.product([0, 1], repeat=len(density)):
        expected[sum(outcome)] += np.prod(
            [p if ran else 1 - p for p, ran in zip(density, outcome, strict=True)]
        )
    np.testing.assert_allclose(statistics.depth_distribution(density), expected, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(arrays(np.float64, 3, elements=st.floats(0.05, 0.95)), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_coins_stay_within_their_bands_95_percent_of_the_times(density, tokens: int, seed: int) -> None:
    trials = 2000
    shares = np.random.default_rng(seed).binomial(tokens, density, size=(trials, 3)) / tokens
    low, high = statistics.share_band(density, tokens).T
    inside = ((shares >= low) & (shares <= high)).mean(axis=0)
    assert (inside > 0.93).all()  # shares are steps: never less than 95% but for the noise of the trials
    low, high = statistics.depth_band(density, tokens)
    if tokens > 100:
        inside = ((shares.sum(axis=1) >= low) & (shares.sum(axis=1) <= high)).mean()
        assert 0.92 < inside < 0.98


def test_coins_do_not_follow_anything_95_percent_of_the_times() -> None:
    generator = np.random.default_rng(3)
    chance = statistics.chance_correlation(400)
    loss = {"loss": Ranking(generator.normal(size=400))}
    found = [
        statistics.rank_correlation(Ranking(generator.binomial(4, 0.5, size=400)), loss, np.ones(400))["loss"]
        for _ in range(600)
    ]
    assert 0.92 < np.mean(np.abs(found) < chance) < 0.98


@given(arrays(np.bool_, st.tuples(st.integers(1, 5), st.integers(1, 40))))
def test_agreement_is_counted_token_by_token(executed) -> None:
    alike, correlation = statistics.agreement(executed)
    for a, b in np.ndindex(alike.shape):
        assert alike[a, b] == pytest.approx(np.mean(executed[a] == executed[b]))
        if executed[a].std() == 0 or executed[b].std() == 0:
            assert np.isnan(correlation[a, b])
        else:
            assert correlation[a, b] == pytest.approx(np.corrcoef(executed[a], executed[b])[0, 1])


@given(arrays(np.float32, st.integers(1, 60), elements=st.integers(-4, 4)), st.integers(1, 10))
def test_bins_are_full_ordered_and_split_no_value(values, bins: int) -> None:
    found = statistics.quantile_bins(values, bins)
    assert set(found) == set(range(found.max() + 1))
    assert found.max() < bins
    order = np.argsort(values, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    for value in np.unique(values):
        assert len(set(found[values == value])) == 1


def test_bins_of_different_values_are_of_one_size() -> None:
    found = statistics.quantile_bins(np.random.default_rng(0).permutation(1000).astype(float), 10)
    assert np.bincount(found).tolist() == [100] * 10
