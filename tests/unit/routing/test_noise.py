"""The routing noise: a pure function of (seed, sample, layer, position), and truly logistic."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from skipmega.routing import noise

LENGTH = 512
SAMPLES = torch.tensor([0, 1, 7, 2**31, 2**32 + 7, 2**40])


Draw = Callable[[noise.NoiseKey, Tensor, int], Tensor]


def uniform(seed: int, samples: Tensor, layer: int, length: int) -> Tensor:
    """Of one layer, [length, b]."""
    return noise.uniform(noise.NoiseKey(seed, samples), torch.tensor([layer]), torch.arange(length))[0]


def logistic(seed: int, samples: Tensor, layer: int, length: int) -> Tensor:
    return noise.logistic(noise.NoiseKey(seed, samples), torch.tensor([layer]), torch.arange(length))[0]


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_it_is_a_pure_function() -> None:
    state = torch.get_rng_state()
    first = uniform(1234, SAMPLES, 3, LENGTH)
    torch.rand(5)
    assert torch.equal(uniform(1234, SAMPLES.clone(), 3, LENGTH), first)
    torch.set_rng_state(state)
    assert first.shape == (LENGTH, len(SAMPLES))
    assert first.dtype == torch.float32


def test_a_sample_s_noise_does_not_depend_on_its_batch() -> None:
    """The same numbers whether the sample comes alone, elsewhere in the batch, or is cut shorter."""
    whole = uniform(1234, SAMPLES, 3, LENGTH)
    order = torch.tensor([4, 0, 2])
    assert torch.equal(uniform(1234, SAMPLES[order], 3, LENGTH), whole[:, order])
    assert torch.equal(uniform(1234, SAMPLES, 3, 100), whole[:100])


@pytest.mark.parametrize("draw", [noise.uniform, noise.logistic])
def test_noise_of_a_token_and_layer_does_not_depend_on_those_drawn_with_it(draw: Draw) -> None:
    """Which ones are together depends on the grid."""
    key = noise.NoiseKey(1234, SAMPLES)
    whole = draw(key, torch.arange(6), torch.arange(LENGTH))
    assert whole.shape == (6, LENGTH, len(SAMPLES))
    some = torch.tensor([3, 8])  # of a rank that has a part of the sequence
    assert torch.equal(draw(key, torch.tensor([5, 2]), some), whole[[5, 2]][:, some])


def test_the_logistic_is_that_of_the_uniform() -> None:
    drawn = uniform(1234, SAMPLES, 3, LENGTH).double()
    expected = (drawn / (1 - drawn)).log()
    torch.testing.assert_close(logistic(1234, SAMPLES, 3, LENGTH).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draw", [uniform, logistic])
def test_it_differs_in_everything_it_is_a_function_of(draw: Callable[..., Tensor]) -> None:
    base = draw(1, SAMPLES, 0, LENGTH)
    bound = 5 / math.sqrt(base.numel())
    for other in (draw(2, SAMPLES, 0, LENGTH), draw(1, SAMPLES, 1, LENGTH), draw(1, SAMPLES + 1, 0, LENGTH)):
        assert abs(correlation(base, other)) < bound
    for lag in (1, 2, 64):
        assert abs(correlation(base[lag:], base[:-lag])) < bound
    for i in range(len(SAMPLES)):
        for j in range(i):
            assert abs(correlation(base[:, i], base[:, j])) < 5 / math.sqrt(LENGTH)


def test_both_halves_of_a_sample_number_count() -> None:
    """7 and 2^32 + 7 share their low word, 0 and 2^40 as well."""
    drawn = uniform(1234, torch.tensor([7, 2**32 + 7, 0, 2**40]), 0, LENGTH)
    assert not (drawn[:, 0] == drawn[:, 1]).any()
    assert not (drawn[:, 2] == drawn[:, 3]).any()


def test_it_has_the_moments_of_its_distribution() -> None:
    """Bounds of five standard errors: a scale wrong by 1 % fails."""
    count = 2**20
    samples = torch.arange(count // 2048)
    flat = uniform(99, samples, 5, 2048).double().flatten()
    assert abs(flat.mean() - 0.5) < 5 * math.sqrt(1 / 12 / count)
    assert abs(flat.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / count)
    drawn = logistic(99, samples, 5, 2048).double().flatten()
    variance = math.pi**2 / 3  # of a logistic; its fourth moment is 7 pi^4 / 15
    assert abs(drawn.mean()) < 5 * math.sqrt(variance / count)
    assert abs(drawn.var() - variance) < 5 * math.sqrt((7 * math.pi**4 / 15 - variance**2) / count)
    counts = torch.histc(flat, bins=64, min=0, max=1)
    chi_square = ((counts - count / 64) ** 2 / (count / 64)).sum()
    assert chi_square < 63 + 5 * math.sqrt(2 * 63), "uniform within 64 bins"


def test_it_lies_strictly_inside_the_unit_interval() -> None:
    drawn = uniform(1234, torch.arange(512), 0, 1024)
    assert drawn.min() > 0
    assert drawn.max() < 1
    assert logistic(1234, torch.arange(512), 0, 1024).isfinite().all()


def test_bits_that_are_all_ones_stay_below_one() -> None:
    drawn = uniform(1234, torch.tensor([47410]), 0, 1024)  # position 1005 draws the largest number
    assert drawn.max() < 1
    assert logistic(1234, torch.tensor([47410]), 0, 1024).isfinite().all()
