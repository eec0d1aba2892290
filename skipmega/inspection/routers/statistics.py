"""What a sample of routing decisions says, and what it would say if coins had made them.

The coin of a layer falls for each token by itself and executes it with the layer's density.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from tqdm import tqdm

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

CONFIDENCE = 0.95
_TWO_SIDED = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))


def share_band(density: Floats, tokens: int) -> Floats:
    """Between which shares of ``tokens`` a coin executes 95% of the times.

    Args:
        density: [layers], of the coins.

    Returns:
        [layers, 2].
    """
    low, high = stats.binom.interval(CONFIDENCE, tokens, density)
    return np.stack([low, high], axis=1) / tokens


def depth_band(density: Floats, tokens: int) -> tuple[float, float]:
    """Between which values the mean depth of ``tokens`` lies 95% of the times, by coins (as a normal
    variable)."""
    reach = _TWO_SIDED * np.sqrt((density * (1 - density)).sum() / tokens)
    return float(density.sum() - reach), float(density.sum() + reach)


def depth_distribution(density: Floats) -> Floats:
    """[layers + 1] probability of each number of executed layers, by coins of ``density`` [layers]."""
    distribution = np.ones(1)
    for share in density:
        distribution = np.convolve(distribution, [1 - share, share])
    return distribution


def agreement(executed: Bools) -> tuple[Floats, Floats]:
    """How much layers decide alike.

    Args:
        executed: [layers, tokens].

    Returns:
        [layers, layers] share of tokens on which two layers decide alike, and the correlation of their
        decisions (NaN of a layer that everybody or nobody executes).
    """
    ran = executed.astype(np.float64)
    tokens = executed.shape[1]
    both, neither = ran @ ran.T / tokens, (1 - ran) @ (1 - ran).T / tokens
    density = ran.mean(axis=1)
    deviation = np.sqrt(density * (1 - density))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = (both - np.outer(density, density)) / np.outer(deviation, deviation)
    return both + neither, correlation.clip(-1, 1)


def quantile_bins(values: NDArray[np.generic], bins: int) -> NDArray[np.int64]:
    """The bin of each of ``values`` [n], from 0 up: at most ``bins``, of about equally many values; equal
    values fall into one bin, and no bin is empty."""
    lowest = np.unique(np.sort(values)[np.arange(bins) * len(values) // bins])
    found: NDArray[np.int64] = np.searchsorted(lowest, values, side="right") - 1
    return found


class Ranking:
    """Values [n] sorted once, to be ranked under many weights."""

    def __init__(self, values: NDArray[np.generic]) -> None:
        distinct, self._place = np.unique(values, return_inverse=True)
        self._distinct = len(distinct)

    def ranks(self, weights: Floats) -> Floats:
        """[n] middle ranks of the values if each is there ``weights`` [n] times."""
        there = np.bincount(self._place, weights, minlength=self._distinct)
        middle = np.cumsum(there) - there / 2 + 0.5
        return middle[self._place]


def rank_correlation(of: Ranking, others: Mapping[str, Ranking], weights: Floats) -> dict[str, float]:
    """Spearman's correlation of one variable with others, each value being there ``weights`` [n] times; NaN
    where a variable has one value."""
    first = _standardised(of.ranks(weights), weights)
    return {
        name: float((weights * first) @ _standardised(other.ranks(weights), weights) / weights.sum())
        for name, other in others.items()
    }


def bootstrap(
    statistic: Callable[[Floats], dict[str, float]],
    unit: NDArray[np.int64],
    resamples: int,
    seed: int,
    show_progress: bool = False,
) -> dict[str, tuple[float, float]]:
    """95% percentile intervals of statistics over whole units drawn with replacement.

    Args:
        statistic: of weights [n]: how often each value is in the sample.
        unit: [n], the unit of each value, from 0.
        resamples: how many samples.
        seed: of the draws.
        show_progress: draw a bar.
    """
    generator = np.random.default_rng(seed)
    units = int(unit.max()) + 1
    drawn: dict[str, list[float]] = {}
    for _ in tqdm(range(resamples), desc="confidence", unit=" samples", disable=not show_progress):
        times = np.bincount(generator.integers(units, size=units), minlength=units)
        for name, value in statistic(times[unit].astype(np.float64)).items():
            drawn.setdefault(name, []).append(value)
    tail = (1 - CONFIDENCE) / 2
    intervals = {name: np.nanquantile(values, [tail, 1 - tail]) for name, values in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in intervals.items()}


def chance_correlation(tokens: int) -> float:
    """95% of the rank correlations of ``tokens`` with a coin's decisions are nearer to 0 than this."""
    return _TWO_SIDED / float(np.sqrt(max(tokens - 1, 1)))


def _standardised(values: Floats, weights: Floats) -> Floats:
    centred = values - weights @ values / weights.sum()
    deviation = np.sqrt(weights @ centred**2 / weights.sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Floats = centred / deviation
    return result
