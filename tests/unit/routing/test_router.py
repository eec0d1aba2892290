"""Decisions, their probabilities, and the gradients that straight-through estimation gives them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipmega.routing.density import squared_penalty
from skipmega.routing.router import Decision, GumbelRouter

LENGTH, BATCH, HIDDEN = 12, 3, 8


@pytest.fixture
def router() -> GumbelRouter:
    router = GumbelRouter(HIDDEN, temperature=0.7)
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(0))
    return router


def gumbel_pair(*shape: int) -> torch.Tensor:
    """Two independent Gumbel variables, of skipping and of executing, in the last dimension."""
    uniform = torch.rand(*shape, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return -torch.log(-torch.log(uniform))


@pytest.fixture
def normed() -> torch.Tensor:
    return torch.randn(LENGTH, BATCH, HIDDEN, generator=torch.Generator().manual_seed(1))


def test_without_noise_the_larger_logit_decides(router: GumbelRouter, normed: torch.Tensor) -> None:
    decision = router(normed, None)
    logits = normed.double() @ router.weight.double().T
    assert torch.equal(decision.execute, logits.argmax(-1) == 1)
    expected = logits.softmax(-1)[..., 1].float()
    torch.testing.assert_close(decision.probability, expected)


def test_equal_logits_skip_as_argmax_would() -> None:
    router = GumbelRouter(HIDDEN, temperature=1.0)
    torch.nn.init.zeros_(router.weight)
    assert not router(torch.ones(2, 1, HIDDEN), None).execute.any()


def test_sampling_is_a_softmax_of_noisy_logits(router: GumbelRouter, normed: torch.Tensor) -> None:
    """What two Gumbel variables do to two logits, their difference does to the margin."""
    gumbel = gumbel_pair(LENGTH, BATCH)
    decision = router(normed, (gumbel[..., 1] - gumbel[..., 0]).float())
    logits = normed.double() @ router.weight.double().T + gumbel
    torch.testing.assert_close(decision.probability, (logits / 0.7).softmax(-1)[..., 1].float())
    assert torch.equal(decision.execute, logits.argmax(-1) == 1)
    assert not torch.equal(decision.execute, router(normed, None).execute), "the noise changes something here"


def test_a_token_executes_as_often_as_its_softmax_says(router: GumbelRouter, normed: torch.Tensor) -> None:
    """The Gumbel-max property, whatever the temperature: 4096 draws of one token, five standard errors."""
    token = 0.2 * normed[:1, :1].expand(4096, 1, HIDDEN)
    wanted = (token[0, 0] @ router.weight.T).softmax(-1)[1]
    gumbel = gumbel_pair(4096, 1)
    seen = router(token, (gumbel[..., 1] - gumbel[..., 0]).float()).execute.float().mean()
    assert abs(seen - wanted) < 5 * (wanted * (1 - wanted) / 4096).sqrt()
    assert 0.05 < wanted < 0.95


def test_the_router_works_in_fp32_whatever_it_is_given(router: GumbelRouter, normed: torch.Tensor) -> None:
    half = router(normed.bfloat16(), None)
    assert half.probability.dtype == torch.float32
    torch.testing.assert_close(half.probability, router(normed.bfloat16().float(), None).probability)


def test_straight_through_is_hard_forward_and_soft_backward(
    router: GumbelRouter, normed: torch.Tensor
) -> None:
    decision = router(normed, gumbel_pair(LENGTH, BATCH).float().diff(dim=-1).squeeze(-1))
    hard = decision.straight_through()
    torch.testing.assert_close(hard, decision.execute.float(), rtol=0, atol=1e-6)
    cotangent = torch.randn(hard.shape, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((hard * cotangent).sum(), router.weight, retain_graph=True)
    p = decision.probability.detach().double()
    slope = cotangent * p * (1 - p) / 0.7  # of p by the margin
    by_execute = torch.einsum("sb,sbh->h", slope, normed.double())
    torch.testing.assert_close(found, torch.stack([-by_execute, by_execute]).float(), rtol=1e-4, atol=1e-5)


def test_straight_through_ignores_how_the_decision_was_made() -> None:
    probability = torch.tensor([[0.2, 0.9]], requires_grad=True)
    decision = Decision(execute=torch.tensor([[True, False]]), probability=probability)
    decision.straight_through().sum().backward()
    torch.testing.assert_close(decision.straight_through(), torch.tensor([[1.0, 0.0]]))
    assert probability.grad is not None
    assert torch.equal(probability.grad, torch.ones(1, 2))


@settings(deadline=None, max_examples=50)
@given(
    ranks=st.integers(1, 4), layers=st.integers(1, 3), target=st.floats(0.1, 1), weight=st.floats(0, 5),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_the_penalty_is_that_of_the_global_density(
    ranks: int, layers: int, target: float, weight: float, seed: int
) -> None:
    """Each rank knows its own densities only; averaging its gradients gives that of the whole formula."""
    generator = torch.Generator().manual_seed(seed)
    densities = torch.rand(ranks, layers, generator=generator, dtype=torch.float64, requires_grad=True)
    whole = weight * sum((densities[:, i].mean() - target) ** 2 for i in range(layers))
    assert isinstance(whole, torch.Tensor)
    (expected,) = torch.autograd.grad(whole, densities)
    mean = densities.mean(0).detach()
    for rank in range(ranks):
        local = densities[rank].detach().requires_grad_()
        penalty = squared_penalty(local, mean, target, weight)
        torch.testing.assert_close(penalty, whole.detach())
        (grad,) = torch.autograd.grad(penalty, local)
        torch.testing.assert_close(grad / ranks, expected[rank])
