"""Density controllers: what they cost, what a step's end moves, and that density follows."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipmega.config import RunConfig, build_config
from skipmega.routing.control import DensityController, squared_penalty
from skipmega.routing.noise import NoiseKey
from skipmega.routing.router import Router
from skipmega.routing.state import RoutingState

LAYERS = 3
CPU = torch.device("cpu")
NO_SCORES = torch.zeros(LAYERS, 8, 2)


def make_config(**routing: Any) -> RunConfig:
    model = {"num_layers": LAYERS + 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 64}
    return build_config(
        {"model": model, "routing": {"router": "gumbel", **routing}, "training": {"steps": 10_000}},
        source="test",
    )


def make_controller(config: RunConfig, mean: Callable[[Tensor], Tensor] | None = None) -> DensityController:
    state = RoutingState(config, config.routed_layers, CPU)
    return DensityController(state, mean or (lambda tensor: tensor.detach().clone()))


@settings(deadline=None, max_examples=50)
@given(ranks=st.integers(1, 4), layers=st.integers(1, 3), weight=st.floats(0, 5), seed=st.integers(0, 1000))
def test_the_squared_penalty_is_that_of_the_global_density(
    ranks: int, layers: int, weight: float, seed: int
) -> None:
    """Each rank knows its own densities only; averaging its gradients gives that of the whole formula."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(layers, generator=generator, dtype=torch.float64)
    densities = torch.rand(ranks, layers, generator=generator, dtype=torch.float64, requires_grad=True)
    whole = torch.stack([weight * (densities[:, i].mean() - target[i]) ** 2 for i in range(layers)]).sum()
    (expected,) = torch.autograd.grad(whole, densities)
    mean = densities.mean(0).detach()
    for rank in range(ranks):
        local = densities[rank].detach().requires_grad_()
        penalty = squared_penalty(local, mean, target, weight)
        torch.testing.assert_close(penalty, whole.detach())
        (grad,) = torch.autograd.grad(penalty, local)
        torch.testing.assert_close(grad / ranks, expected[rank])


def test_the_penalty_is_weighted_and_each_layer_has_its_target() -> None:
    controller = make_controller(make_config(density=[0.2, 0.5, 0.9], density_loss_weight=0.3))
    densities = torch.tensor([0.4, 0.4, 0.4], requires_grad=True)
    penalty = controller.penalty(densities, 0)
    assert penalty.item() == pytest.approx(0.3 * (0.2**2 + 0.1**2 + 0.5**2))
    (gradient,) = torch.autograd.grad(penalty, densities)
    torch.testing.assert_close(gradient, 0.3 * 2 * torch.tensor([0.2, -0.1, -0.5]))


def test_the_coefficient_s_penalty_is_linear() -> None:
    controller = make_controller(make_config(density_control="coefficient"))
    densities = torch.tensor([0.4, 0.6, 0.9], requires_grad=True)
    assert controller.penalty(densities, 0) == 0
    controller.state.coefficient.copy_(torch.tensor([0.1, -0.2, 0.3]))
    penalty = controller.penalty(densities, 0)
    assert penalty.item() == pytest.approx(0.04 - 0.12 + 0.27)
    (gradient,) = torch.autograd.grad(penalty, densities)
    assert torch.equal(gradient, controller.state.coefficient)


@pytest.mark.parametrize(
    "routing", [{"density_control": "bias"}, {"density_control": "none"}, {"router": "quantile"},
                {"router": "topk"}, {"router": "random"}],
    ids=lambda routing: "-".join(routing.values()),
)  # fmt: skip
def test_other_controls_cost_nothing(routing: dict[str, str]) -> None:
    controller = make_controller(make_config(**routing))
    densities = torch.rand(LAYERS, requires_grad=True)
    penalty = controller.penalty(densities, 0)
    assert penalty.shape == ()
    assert penalty == 0
    before = controller.state.threshold.clone()
    controller.observe(densities, NO_SCORES)
    controller.end_step(0)
    moves = routing.get("density_control") == "bias"
    assert torch.equal(controller.state.threshold, before) != moves
    assert not controller.state.coefficient.any()


def test_the_coefficient_integrates_the_error_outside_its_dead_band() -> None:
    """Of the mean over a step's micro-batches, each layer against its own target."""
    config = make_config(
        density=[0.2, 0.5, 0.9], density_control="coefficient", coefficient_rate=0.25, dead_band=0.05
    )
    controller, expected = make_controller(config), [0.0, 0.0, 0.0]
    threshold = controller.state.threshold.clone()
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for step in range(60):
        seen = torch.rand(3, LAYERS, generator=generator)
        if step % 2:
            seen = controller.state.target + 0.1 * (seen - 0.5)
        for densities in seen:
            controller.observe(densities, NO_SCORES)
        controller.end_step(step)
        for i, (density, target) in enumerate(zip(seen.mean(0).tolist(), (0.2, 0.5, 0.9), strict=True)):
            if abs(density - target) > 0.05:
                expected[i] += 0.25 * (density - target)
            else:
                inside += 1
        assert controller.state.coefficient.tolist() == pytest.approx(expected, abs=1e-5)
    assert 60 < inside < 180
    assert torch.equal(controller.state.threshold, threshold)


def test_the_bias_integrates_the_error() -> None:
    """Too many executed: the threshold rises."""
    config = make_config(density=0.4, density_control="bias", bias_rate=0.5)
    controller = make_controller(config)
    before = controller.state.threshold.clone()
    for densities in ([0.5, 0.1, 0.4], [0.7, 0.3, 0.4]):
        controller.observe(torch.tensor(densities), NO_SCORES)
    controller.end_step(0)
    moved = controller.state.threshold - before
    noise = math.pi / math.sqrt(3)  # there is nothing else
    torch.testing.assert_close(moved, 0.5 * noise * torch.tensor([0.2, -0.2, 0.0]))
    assert not controller.state.coefficient.any()


@pytest.mark.parametrize("control", ["penalty", "coefficient", "bias"])
def test_while_density_warms_up_it_is_held_where_it_should_be(control: str) -> None:
    config = make_config(density=0.2, density_control=control, density_warmup_steps=80)
    for step, wanted in ((0, 1.0), (40, 0.6), (79, 0.3), (80, 0.2)):
        controller = make_controller(config)
        before = controller.state.threshold.clone()
        densities = torch.full((LAYERS,), wanted)
        assert controller.penalty(densities, step).item() == pytest.approx(0, abs=1e-9)
        controller.observe(densities, NO_SCORES)
        controller.end_step(step)
        torch.testing.assert_close(controller.state.threshold, before)
        assert controller.state.coefficient.abs().max() < 1e-6


def drift(step: int) -> float:
    """What a score's mean does: off the start, away for a while, then at rest."""
    return 1.2 + 0.003 * min(step, 300)


@pytest.mark.parametrize("router", ["sigmoid", "gumbel"])
@pytest.mark.parametrize("target", [0.15, 0.5, 0.8])
def test_the_bias_holds_density_while_scores_drift(router: str, target: float) -> None:
    config = make_config(router=router, density=target, density_control="bias", bias_rate=0.3)
    controller, seen = make_controller(config), []
    start = controller.state.threshold.clone()
    layer = Router(config.routing, 1)
    for step in range(400):
        tokens = torch.randn(256, 4, 1, generator=torch.Generator().manual_seed(step)) * 1.5 + drift(step)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(1.0)
                if len(parameter) == 2:
                    parameter[0] = 0.0
            inputs = controller.state.for_training(
                step, NoiseKey(0, torch.arange(4) + 4 * step), torch.arange(256)
            )
            decisions = [layer(tokens, told, target) for told in inputs.values()]
        densities = torch.stack([decision.execute.float().mean() for decision in decisions])
        controller.observe(densities, torch.stack([decision.score for decision in decisions]))
        controller.end_step(step)
        seen.append(densities)
    last = torch.stack(seen[-50:]).mean(0)
    assert (last - target).abs().max() < 0.02
    assert (controller.state.threshold - start).min() > 0.5, "there was something to do"


@pytest.mark.parametrize(
    ("routing", "since"),
    [
        ({"router": "sigmoid", "density_control": "bias"}, 300),
        ({"router": "quantile", "quantile_from": "running"}, 50),
    ],
    ids=["sigmoid-bias", "quantile-running"],
)
@pytest.mark.parametrize("target", [0.25, 0.479])
def test_scores_that_grow_and_sink_without_end_are_followed(
    target: float, routing: dict[str, str], since: int
) -> None:
    """In training, and in evaluation by running quantiles that are slow. As straight-through updates make
    scores: nothing bounds them."""
    config = make_config(density=target, eval_density=target, running_rate=0.02, **routing)
    controller, trained, evaluated = make_controller(config), [], []
    for step in range(400):
        generator = torch.Generator().manual_seed(step)
        scores = (1 + 0.02 * step) * torch.randn(LAYERS, 512, 4, generator=generator) - 0.05 * step
        told = controller.state.for_training(step, NoiseKey(0, torch.arange(4)), torch.arange(512))
        thresholds = torch.stack([inputs.threshold for inputs in told.values()])
        densities = (scores > thresholds.view(-1, 1, 1)).float().mean(dim=(1, 2))
        held_out_thresholds = controller.state.evaluation_thresholds()
        held_out = (scores > held_out_thresholds.view(-1, 1, 1)).float().mean(dim=(1, 2))
        trained.append(densities)
        evaluated.append(held_out)
        controller.observe(densities, scores)
        controller.end_step(step)
    for seen in (trained, evaluated):
        for first in range(since, 400, 50):
            assert (torch.stack(seen[first : first + 50]).mean(0) - target).abs().max() < 0.02


@pytest.mark.parametrize("target", [0.25, 0.6])
def test_the_coefficient_holds_density_while_a_loss_pulls_elsewhere(target: float) -> None:
    """A layer whose own loss is least at a drifting mean score, and descends it plus the penalty."""
    config = make_config(
        router="sigmoid", density=target, density_control="coefficient", coefficient_rate=0.05
    )
    controller, seen = make_controller(config), []
    mean = torch.zeros(LAYERS, requires_grad=True)
    for step in range(800):
        noise = torch.randn(512, 1, generator=torch.Generator().manual_seed(step))
        probability = torch.sigmoid(mean + noise)
        densities = ((noise + mean > 0).float() + probability - probability.detach()).mean(0)
        own = 0.1 * (mean - drift(step)).square().sum()
        (gradient,) = torch.autograd.grad(own + controller.penalty(densities, step), mean)
        with torch.no_grad():
            mean -= 0.5 * gradient
        controller.observe(densities, NO_SCORES)
        controller.end_step(step)
        seen.append(densities.detach())
    assert (torch.stack(seen[-50:]).mean(0) - target).abs().max() < 0.02
    assert controller.state.coefficient.min() > 0.05


class DataRanks:
    """Threads that play data-parallel ranks."""

    def __init__(self, size: int) -> None:
        self._given: list[Tensor] = [torch.zeros(0)] * size
        self._barrier = threading.Barrier(size, timeout=20)

    def mean(self, rank: int) -> Callable[[Tensor], Tensor]:
        def of_all(tensor: Tensor) -> Tensor:
            self._given[rank] = tensor.detach().clone()
            self._barrier.wait()
            mean = torch.stack(self._given).mean(0)
            self._barrier.wait()
            return mean

        return of_all


@pytest.mark.parametrize("control", ["penalty", "coefficient", "bias"])
def test_data_ranks_agree_with_each_other_and_with_one_that_sees_everything(control: str) -> None:
    """State after some steps, penalties on the way; quantiles are averages of those of the ranks."""
    config = make_config(router="sigmoid", density=0.3, density_control=control)
    steps, micro_batches = 5, 2
    densities = torch.rand(steps, micro_batches, 2, LAYERS, generator=torch.Generator().manual_seed(1))
    scores = torch.randn(steps, micro_batches, 2, LAYERS, 65, 1, generator=torch.Generator().manual_seed(2))
    world = DataRanks(2)

    def train(rank: int) -> tuple[RoutingState, list[Tensor]]:
        controller, penalties = make_controller(config, world.mean(rank)), []
        for step in range(steps):
            for micro_batch in range(micro_batches):
                penalties.append(controller.penalty(densities[step, micro_batch, rank], step))
                controller.observe(densities[step, micro_batch, rank], scores[step, micro_batch, rank])
            controller.end_step(step)
        return controller.state, penalties

    with ThreadPoolExecutor(2) as pool:
        (first, of_first), (second, of_second) = pool.map(train, range(2))
    alone, of_alone = make_controller(config), []
    for step in range(steps):
        for micro_batch in range(micro_batches):
            both = densities[step, micro_batch].mean(0)
            of_alone.append(alone.penalty(both, step))
            alone.observe(both, scores[step, micro_batch].transpose(0, 1).sort(-2).values.mean(1))
        alone.end_step(step)
    for name, expected in alone.state.tensors().items():
        assert torch.equal(first.tensors()[name], second.tensors()[name]), name
        torch.testing.assert_close(first.tensors()[name], expected)
    mean = [(a + b) / 2 for a, b in zip(of_first, of_second, strict=True)]
    torch.testing.assert_close(torch.stack(mean), torch.stack(of_alone))


def test_a_step_forgets_the_one_before() -> None:
    controller = make_controller(make_config(router="sigmoid", density=0.5, density_control="bias"))
    for step, density in enumerate((1.0, 0.5)):
        controller.observe(torch.full((LAYERS,), density), NO_SCORES)
        before = controller.state.threshold.clone()
        controller.end_step(step)
        assert bool((controller.state.threshold != before).all()) == (density == 1.0)
    assert not math.isnan(controller.state.threshold.sum().item())
