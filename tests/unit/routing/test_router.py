"""Decisions, their probabilities, and the gradients that straight-through estimation gives them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipmega.config.routing import RoutingConfig
from skipmega.routing.noise import NoiseKey, logistic
from skipmega.routing.router import Decision, Router, RouterInputs, best_of_groups, share_threshold

LENGTH, BATCH, HIDDEN, TEMPERATURE = 12, 3, 8, 0.7


def make_router(hidden: int = HIDDEN, **routing: Any) -> Router:
    router = Router(RoutingConfig.model_validate({"router": "gumbel", **routing}), hidden)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(generator=generator)
    return router


def told(threshold: float = 0.0, temperature: float = 1.0, noise: Tensor | None = None) -> RouterInputs:
    return RouterInputs(torch.tensor(threshold), torch.tensor(temperature), noise)


def random_tokens(length: int = LENGTH) -> Tensor:
    return torch.randn(length, BATCH, HIDDEN, generator=torch.Generator().manual_seed(1))


def gumbel_pair(*shape: int) -> Tensor:
    """Two independent Gumbel variables, of skipping and of executing, in the last dimension."""
    uniform = torch.rand(*shape, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return -torch.log(-torch.log(uniform))


def weight_of(router: Router) -> Tensor:
    assert router.weight is not None
    return router.weight.detach().double()


# gumbel


def test_without_noise_the_larger_logit_decides() -> None:
    router, tokens = make_router(), random_tokens()
    decision = router(tokens, told(), 0.5)
    logits = tokens.double() @ weight_of(router).T
    assert torch.equal(decision.execute, logits.argmax(-1) == 1)
    torch.testing.assert_close(decision.probability, logits.softmax(-1)[..., 1].float())


def test_equal_logits_skip_as_argmax_would() -> None:
    router = make_router()
    torch.nn.init.zeros_(router.get_parameter("weight"))
    assert not router(torch.ones(2, 1, HIDDEN), told(), 0.5).execute.any()


def test_sampling_is_a_softmax_of_noisy_logits() -> None:
    """What two Gumbel variables do to two logits, their difference does to the margin."""
    router, tokens, gumbel = make_router(), random_tokens(), gumbel_pair(LENGTH, BATCH)
    noise = (gumbel[..., 1] - gumbel[..., 0]).float()
    decision = router(tokens, told(temperature=TEMPERATURE, noise=noise), 0.5)
    logits = tokens.double() @ weight_of(router).T + gumbel
    torch.testing.assert_close(decision.probability, (logits / TEMPERATURE).softmax(-1)[..., 1].float())
    assert torch.equal(decision.execute, logits.argmax(-1) == 1)
    greedy = router(tokens, told(), 0.5)
    assert not torch.equal(decision.execute, greedy.execute), "the noise changes something here"
    assert torch.equal(decision.score, greedy.score), "but not what evaluation compares"


def test_a_token_executes_as_often_as_its_softmax_says() -> None:
    """The Gumbel-max property, whatever the temperature: 4096 draws of one token, five standard errors."""
    router, gumbel = make_router(), gumbel_pair(4096, 1)
    token = 0.2 * random_tokens()[:1, :1].expand(4096, 1, HIDDEN)
    wanted = (token[0, 0].double() @ weight_of(router).T).softmax(-1)[1]
    noise = (gumbel[..., 1] - gumbel[..., 0]).float()
    seen = router(token, told(temperature=TEMPERATURE, noise=noise), 0.5).execute.double().mean()
    assert abs(seen - wanted) < 5 * (wanted * (1 - wanted) / 4096).sqrt()
    assert 0.05 < wanted < 0.95


# what all have in common


KINDS: dict[str, dict[str, Any]] = {
    "gumbel": {"router": "gumbel"},
    "gumbel-bias": {"router": "gumbel", "router_bias": True},
    "sigmoid": {"router": "sigmoid"},
    "sigmoid-bias": {"router": "sigmoid", "router_bias": True},
    "quantile": {"router": "quantile"},
    "topk": {"router": "topk"},
    "topk-predictor": {"router": "topk", "stand_in": "predictor"},
    "random": {"router": "random"},
    "fixed_input": {"router": "fixed_input"},
    "highway": {"router": "highway"},
    "never": {"router": "never"},
}
PARAMETERS = {
    "gumbel": 200, "gumbel-bias": 202, "sigmoid": 100, "sigmoid-bias": 101, "quantile": 100, "topk": 100,
    "topk-predictor": 100 + 25 * 100 + 25, "random": 0, "fixed_input": 1, "highway": 100,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_has_the_parameters_it_is_said_to_have(kind: str) -> None:
    """``never`` reads nothing, and has none."""
    routing = RoutingConfig.model_validate({"router": "gumbel", **KINDS[kind]})
    expected = PARAMETERS.get(kind, 0)
    assert Router.parameter_count(routing, 100) == expected
    assert sum(p.numel() for p in Router(routing, 100).parameters()) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_router_works_in_fp32_whatever_it_is_given(kind: str) -> None:
    router, tokens = make_router(**KINDS[kind]), random_tokens().bfloat16()
    half, full = (router(t, told(), 0.5) for t in (tokens, tokens.float()))
    for found, expected in zip(half[1:], full[1:], strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)
    assert torch.equal(half.execute, full.execute)
    assert half.execute.shape == half.probability.shape == half.score.shape == (LENGTH, BATCH)


@pytest.mark.parametrize("kind", ["sigmoid", "quantile", "topk", "topk-predictor", "gumbel"])
@pytest.mark.parametrize("threshold", [-0.8, 0.0, 1.1])
def test_in_evaluation_a_token_runs_whose_score_exceeds_the_threshold(kind: str, threshold: float) -> None:
    router = make_router(**KINDS[kind]).eval()
    decision = router(random_tokens(), told(threshold), 0.5)
    assert torch.equal(decision.execute, decision.score > threshold)
    assert 0 < decision.execute.sum() < LENGTH * BATCH
    assert not decision.score.requires_grad
    assert decision.auxiliary == 0
    exactly = float(decision.score[0, 0])
    assert not router(random_tokens(), told(exactly), 0.5).execute[0, 0], "not one that only reaches it"


def test_the_score_of_one_row_is_against_zero() -> None:
    router, tokens = make_router(router="sigmoid", router_bias=True), random_tokens()
    decision = router(tokens, told(0.3, temperature=2.0), 0.5)
    assert router.bias is not None
    score = (tokens.double() @ weight_of(router).T)[..., 0] + router.bias.double()
    torch.testing.assert_close(decision.score, score.float())
    torch.testing.assert_close(decision.probability, torch.sigmoid((score - 0.3) / 2).float())


@pytest.mark.parametrize("kind", ["random", "fixed_input"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_coin_falls_as_often_as_its_threshold_says(kind: str, share: float) -> None:
    """Whatever the token; a bias of the router counts like a threshold."""
    router = make_router(**KINDS[kind])
    bias = 0.0 if router.bias is None else router.bias.item()
    noise = logistic(NoiseKey(4, torch.arange(BATCH)), torch.tensor([2]), torch.arange(4096))[0]
    threshold = bias - math.log(share / (1 - share))
    decision = router(random_tokens(4096), told(threshold, 0.5, noise), 0.5)
    count = 4096 * BATCH
    assert abs(decision.execute.double().mean() - share) < 5 * math.sqrt(share * (1 - share) / count)
    other = router(torch.zeros(4096, BATCH, HIDDEN), told(threshold, 0.5, noise), 0.5)
    assert torch.equal(other.execute, decision.execute)


def test_highway_and_never_decide_alike_for_all() -> None:
    for kind, runs in (("highway", True), ("never", False)):
        for training in (True, False):
            router = make_router(**KINDS[kind]).train(training)
            assert (router(random_tokens(), told(), 1.0).execute == runs).all()


# ranking


@settings(deadline=None, max_examples=100)
@given(count=st.integers(1, 60), share=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_as_many_scores_exceed_the_threshold_as_the_share_asks_for(
    count: int, share: float, seed: int
) -> None:
    score = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).float()
    assert int((score > share_threshold(score, share)).sum()) == math.ceil(share * count - 1e-9)


def test_shares_that_are_not_exact_in_binary_are_not_rounded_up() -> None:
    """0.07 * 100 is 7.000000000000001."""
    score = torch.arange(100.0)
    for share in (0.07, 0.14, 0.28, 0.55, 0.56, 0.57):
        assert int((score > share_threshold(score, share)).sum()) == round(share * 100)


def test_scores_that_tie_with_the_quantile_are_skipped() -> None:
    score = torch.tensor([[1.0, 2.0], [2.0, 2.0], [3.0, 0.0]])
    assert int((score > share_threshold(score, 0.5)).sum()) == 1


@pytest.mark.parametrize("density", [0.01, 0.25, 0.5, 0.77, 1.0])
def test_the_quantile_router_executes_its_share_of_the_micro_batch(density: float) -> None:
    """The best ones of all sequences together."""
    decision = make_router(router="quantile")(random_tokens(), told(100.0), density)
    assert int(decision.execute.sum()) == math.ceil(density * LENGTH * BATCH)
    skipped = decision.score[~decision.execute]
    assert not len(skipped) or decision.score[decision.execute].min() > skipped.max()
    torch.testing.assert_close(decision.probability, torch.sigmoid(decision.score))


def test_a_running_quantile_is_the_threshold_it_is_told() -> None:
    router = make_router(router="quantile", quantile_from="running")
    decision = router(random_tokens(), told(0.4), 0.01)
    assert torch.equal(decision.execute, decision.score > 0.4)


@settings(deadline=None, max_examples=60)
@given(group=st.integers(1, 7), groups=st.integers(1, 3), share=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_the_best_of_each_group_are_chosen(group: int, groups: int, share: float, seed: int) -> None:
    count = group * groups * BATCH
    score = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).float().view(-1, BATCH)
    chosen = best_of_groups(score, group, share)
    for b in range(BATCH):
        for first in range(0, group * groups, group):
            of_group = score[first : first + group, b]
            ranked = sorted(of_group.tolist(), reverse=True)[: math.ceil(share * group - 1e-9)]
            assert sorted(of_group[chosen[first : first + group, b]].tolist(), reverse=True) == ranked


def test_topk_ranks_within_its_groups_or_the_whole_sequence() -> None:
    for group, count in ((4, 1), (6, 2), (None, 3)):
        router = make_router(router="topk", group_size=group)
        decision = router(random_tokens(), told(100.0), 0.25)
        assert (decision.execute.view(-1, group or LENGTH, BATCH).sum(1) == count).all()
        assert torch.equal(decision.execute, best_of_groups(decision.score, group or LENGTH, 0.25))


def test_the_predictor_stands_in_for_the_score_and_teaches_nobody_else() -> None:
    """In training the router's own score ranks; the predictor's loss reaches the predictor alone."""
    router, tokens = make_router(**KINDS["topk-predictor"]), random_tokens().requires_grad_()
    decision = router(tokens, told(), 0.5)
    own = (tokens.double() @ weight_of(router).T)[..., 0].float()
    assert torch.equal(decision.execute, best_of_groups(own.detach(), LENGTH, 0.5))
    assert not torch.allclose(decision.score, own)
    assert router.weight is not None
    assert router.predictor is not None
    leaves = [tokens, router.weight, router.predictor.up, router.predictor.down]
    of_tokens, of_weight, *of_predictor = torch.autograd.grad(decision.auxiliary, leaves, allow_unused=True)
    assert of_tokens is None
    assert of_weight is None
    assert all(gradient is not None and gradient.any() for gradient in of_predictor)


def test_a_stand_in_learns_who_is_chosen() -> None:
    """Descending its loss alone, evaluation comes to decide as training did, tokens being separable."""
    router = make_router(router="topk", stand_in="predictor", stand_in_weight=1.0)
    tokens = random_tokens(64)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        router(tokens, told(), 0.25).auxiliary.backward()
        optimizer.step()
    trained = router(tokens, told(), 0.25).execute
    agree = (router.eval()(tokens, told(), 0.25).execute == trained).float().mean()
    assert agree > 0.95


# probability, gradient and entropy


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    router, tokens = make_router(), random_tokens()
    noise = gumbel_pair(LENGTH, BATCH).float().diff(dim=-1).squeeze(-1)
    decision = router(tokens, told(temperature=TEMPERATURE, noise=noise), 0.5)
    hard = decision.straight_through()
    torch.testing.assert_close(hard, decision.execute.float(), rtol=0, atol=1e-6)
    cotangent = torch.randn(hard.shape, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((hard * cotangent).sum(), router.get_parameter("weight"))
    p = decision.probability.detach().double()
    slope = cotangent * p * (1 - p) / TEMPERATURE  # of p by the margin
    by_execute = torch.einsum("sb,sbh->h", slope, tokens.double())
    torch.testing.assert_close(found, torch.stack([-by_execute, by_execute]).float(), rtol=1e-4, atol=1e-5)


def decided(probability: Tensor, execute: Tensor) -> Decision:
    return Decision(execute, probability, torch.zeros_like(probability).detach(), torch.zeros(()))


def test_straight_through_ignores_how_the_decision_was_made() -> None:
    probability = torch.tensor([[0.2, 0.9]], requires_grad=True)
    decision = decided(probability, torch.tensor([[True, False]]))
    decision.straight_through().sum().backward()
    torch.testing.assert_close(decision.straight_through(), torch.tensor([[1.0, 0.0]]))
    assert probability.grad is not None
    assert torch.equal(probability.grad, torch.ones(1, 2))


def test_entropy_is_that_of_the_mean_decision_in_nats() -> None:
    shares = [0.5, 0.9, 0.2, 0.001]
    probability = torch.tensor([shares], requires_grad=True)
    entropy = decided(probability, probability.detach() > 0.5).entropy()
    expected = sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in shares) / len(shares)
    assert entropy.item() == pytest.approx(expected, rel=1e-5)
    assert not entropy.requires_grad
    certain = torch.tensor([[0.0, 1.0]])
    assert decided(certain, certain > 0.5).entropy().item() == pytest.approx(0, abs=1e-5)
    even = torch.full((2, 2), 0.5)
    assert decided(even, even > 0.5).entropy().item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", ["gumbel", "sigmoid", "quantile", "highway"])
def test_the_z_loss_keeps_logits_small(kind: str) -> None:
    """Weight times the mean square of the log-sum-exp of both logits, one logit being against 0."""
    router, tokens = make_router(**KINDS[kind], z_loss_weight=0.3), random_tokens()
    logits = tokens.double() @ weight_of(router).T
    if logits.shape[-1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=-1)
    expected = 0.3 * logits.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(router(tokens, told(), 0.5).auxiliary.double(), expected, rtol=1e-5, atol=0)
