"""Mixtures: who gives which sample, in any number of stages."""

import math

from hypothesis import given
from hypothesis import strategies as st

from skipmega.data.order.mixture import Mixture, Stage

WEIGHTS = st.lists(st.floats(0, 5), min_size=3, max_size=3).filter(lambda weights: sum(weights) > 0.01)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[Stage], int]:
    begins = [0, *sorted(draw(st.lists(st.integers(1, 500), max_size=3, unique=True)))]
    return [Stage(begin, tuple(draw(WEIGHTS))) for begin in begins], draw(st.integers(0, 2**40))


@given(mixtures())
def test_no_sample_of_a_source_is_lost_or_comes_twice(
    mixture: tuple[list[Stage], int],
) -> None:
    dealt = Mixture(*mixture)
    given_so_far = [0, 0, 0]
    for sample in range(600):
        assert dealt.drawn(sample) == tuple(given_so_far)
        source, number = dealt.locate(sample)
        assert number == given_so_far[source]
        given_so_far[source] += 1


@given(weights=WEIGHTS, seed=st.integers(0, 2**40), samples=st.integers(0, 10**13))
def test_sources_stay_near_their_share(weights: list[float], seed: int, samples: int) -> None:
    """Within a few samples, not within the square root of their number as chance would have it."""
    drawn = Mixture([Stage(0, tuple(weights))], seed).drawn(samples)
    assert sum(drawn) == samples
    rounding = samples * 2.0**-32
    for weight, count in zip(weights, drawn, strict=True):
        assert abs(count - samples * weight / sum(weights)) < 3 + 2 * math.log2(samples + 1) + rounding


@given(mixtures(), st.integers(0, 10**9))
def test_far_samples_follow_from_counts(mixture: tuple[list[Stage], int], sample: int) -> None:
    dealt = Mixture(*mixture)
    source, number = dealt.locate(sample)
    before, after = dealt.drawn(sample), dealt.drawn(sample + 1)
    assert number == before[source]
    assert [late - early for early, late in zip(before, after, strict=True)] == [
        int(other == source) for other in range(3)
    ]


@given(mixtures())
def test_a_later_stage_changes_nothing_before_it(mixture: tuple[list[Stage], int]) -> None:
    stages, seed = mixture
    longer = Mixture([*stages, Stage(700, (1.0, 2.0, 3.0))], seed)
    shorter = Mixture(stages, seed)
    assert [longer.locate(sample) for sample in range(700)] == [shorter.locate(n) for n in range(700)]


def test_a_resting_source_gives_nothing() -> None:
    dealt = Mixture([Stage(0, (1.0, 0.0)), Stage(10, (0.0, 1.0)), Stage(20, (1.0, 0.0))], 3)
    assert [dealt.locate(sample) for sample in (0, 9, 10, 19, 20)] == [
        (0, 0),
        (0, 9),
        (1, 0),
        (1, 9),
        (0, 10),
    ]


def test_the_mixture_never_changes() -> None:
    """What runs were started with they must read to their end: these numbers are not to be updated."""
    dealt = Mixture([Stage(0, (0.7, 0.2, 0.1)), Stage(12, (0.1, 0.2, 0.7))], 1234)
    assert "".join(str(dealt.locate(sample)[0]) for sample in range(24)) == DEALT_SOURCES
    assert dealt.locate(10**12) == FAR


DEALT_SOURCES = "010010200100220222212202"
FAR = (2, 699999999945)
