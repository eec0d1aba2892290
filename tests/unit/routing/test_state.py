"""What routing remembers, and the thresholds that follow: where routers start, and where they can go."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from skipmega.config import RunConfig, build_config
from skipmega.routing.control import DensityController
from skipmega.routing.noise import NoiseKey, logistic
from skipmega.routing.router import Decision, Router
from skipmega.routing.state import LEVELS, RoutingState, warmed_up

LAYERS, HIDDEN, LENGTH, BATCH = 10, 64, 512, 4
AT = torch.arange(LENGTH)
CPU = torch.device("cpu")
KEY = NoiseKey(3, torch.arange(BATCH))
DENSITIES = [0.1, 0.25, 0.5, 0.8, 0.95]


def make_config(steps: int = 100, **routing: Any) -> RunConfig:
    model = {"num_layers": LAYERS + 2, "hidden_size": HIDDEN, "num_attention_heads": 4, "vocab_size": 64}
    return build_config(
        {"model": model, "routing": {"router": "gumbel", **routing}, "training": {"steps": steps}},
        source="test",
    )


def make_state(config: RunConfig) -> RoutingState:
    return RoutingState(config, config.routed_layers, CPU)


def fresh_router(config: RunConfig, layer: int) -> Router:
    """As initialised: weights normal with ``init_std``, biases zero."""
    router = Router(config.routing, HIDDEN)
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for name, parameter in router.named_parameters():
            parameter.normal_(0.0, 0.0 if name == "bias" else config.model.init_std, generator=generator)
    return router


def normed_tokens(layer: int) -> Tensor:
    x = torch.randn(LENGTH, BATCH, HIDDEN, generator=torch.Generator().manual_seed(1000 + layer))
    return x / x.square().mean(-1, keepdim=True).sqrt()


@torch.no_grad()
def decide(config: RunConfig, training: bool, step: int = 0) -> list[Decision]:
    """Of every layer."""
    state = make_state(config)
    trained, evaluated = state.for_training(step, KEY, AT), state.for_evaluation(step, BATCH, AT)
    inputs = trained if training else evaluated
    wanted = {layer: 1 - (1 - d) * warmed_up(config, step) for layer, d in config.densities.items()}
    return [
        fresh_router(config, layer).train(training)(normed_tokens(layer), inputs[layer], wanted[layer])
        for layer in config.routed_layers
    ]


def share(decisions: list[Decision]) -> float:
    return torch.stack([decision.execute for decision in decisions]).double().mean().item()


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(
    "routing",
    [
        {"router": "gumbel"},
        {"router": "gumbel", "temperature": 3.0},
        {"router": "sigmoid"},
        {"router": "sigmoid", "router_bias": True, "wrap": "mlp"},
        {"router": "quantile"},
        {"router": "quantile", "quantile_from": "running"},
        {"router": "topk"},
        {"router": "random"},
        {"router": "fixed_input"},
    ],
    ids=lambda routing: "-".join(map(str, routing.values())),
)
def test_training_starts_at_the_target_density(routing: dict[str, Any], density: float) -> None:
    """Within a point and a half: a fresh router's scores vary with its weights."""
    assert share(decide(make_config(density=density, **routing), training=True)) == pytest.approx(
        density, abs=0.015
    )


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("router", ["sigmoid", "quantile", "random", "fixed_input"])
def test_evaluation_starts_there_too(router: str, density: float) -> None:
    """But for gumbel, whose greedy decisions follow once it is sure, and topk, whose stand-in must learn."""
    decisions = decide(make_config(density=density, router=router), training=False)
    assert share(decisions) == pytest.approx(density, abs=0.02)


@pytest.mark.parametrize("router", ["gumbel", "sigmoid", "quantile", "topk", "random", "fixed_input"])
def test_at_density_one_everybody_runs(router: str) -> None:
    for running in ("batch", "running"):
        config = make_config(density=1.0, router=router, quantile_from=running)
        assert share(decide(config, training=True)) == 1
    config = make_config(density=0.5, eval_density=1.0, router=router)
    assert share(decide(config, training=False)) == 1


def test_each_layer_starts_at_its_own_target() -> None:
    config = make_config(density={"first": 0.1, "last": 0.9}, router="quantile")
    shares = [share([decision]) for decision in decide(config, training=True)]
    assert shares == pytest.approx([0.1 + 0.8 * i / (LAYERS - 1) for i in range(LAYERS)], abs=1e-3)
    threshold = make_state(make_config(density={"first": 0.1, "last": 0.9})).threshold
    assert torch.sigmoid(-threshold).tolist() == pytest.approx(shares, abs=1e-3)


def test_temperature_runs_linearly_over_the_run() -> None:
    state = make_state(make_config(steps=11, temperature=2.0, final_temperature=0.5))
    assert [state.temperature(step) for step in range(11)] == pytest.approx(
        [2.0 - 0.15 * step for step in range(11)]
    )
    assert state.temperature(1000) == pytest.approx(0.5), "evaluation after the last step"
    inputs = state.for_training(4, KEY, AT)
    assert all(told.temperature.item() == pytest.approx(1.4) for told in inputs.values())
    assert make_state(make_config(temperature=2.0)).temperature(50) == 2.0
    assert make_state(make_config(steps=1, temperature=2.0, final_temperature=1.0)).temperature(0) == 2.0


def test_density_comes_from_one_in_eighths() -> None:
    """Each stage is a compiled program."""
    config = make_config(density=0.2, router="quantile", density_warmup_steps=40)
    assert [warmed_up(config, step) for step in (0, 4, 5, 9, 10, 39, 40, 1000)] == [
        0, 0, 1 / 8, 1 / 8, 2 / 8, 7 / 8, 1, 1,
    ]  # fmt: skip
    assert len({warmed_up(config, step) for step in range(100)}) == 9
    assert warmed_up(make_config(), 0) == 1


@pytest.mark.parametrize(
    "routing",
    [
        {"router": "quantile"},
        {"router": "quantile", "quantile_from": "running"},
        {"router": "topk"},
        {"router": "random"},
        {"router": "gumbel"},
        {"router": "sigmoid"},
        {"router": "fixed_input"},
    ],
    ids=lambda routing: "-".join(map(str, routing.values())),
)
def test_a_run_that_warms_up_starts_dense(routing: dict[str, Any]) -> None:
    config = make_config(density=0.2, density_warmup_steps=40, **routing)
    for step, wanted in ((0, 1.0), (20, 0.6), (40, 0.2)):
        found = share(decide(config, training=True, step=step))
        assert found == pytest.approx(wanted, abs=0.015 if wanted < 1 else 0), step


def skewed(layer: int, step: int, count: int = 2000) -> Tensor:
    """Scores of no simple distribution, another one in each layer: [1, count, 1]."""
    generator = torch.Generator().manual_seed(100 * layer + step)
    x = torch.randn(count, generator=generator)
    return ((0.3 * layer + x).exp() - 2 * (x > 1) + layer).view(1, -1, 1)


@pytest.mark.parametrize("wanted", [0.05, 0.3, 0.5, 0.77, 0.9])
@pytest.mark.parametrize("router", ["gumbel", "sigmoid", "quantile", "topk"])
def test_the_dial_gives_evaluation_another_density(router: str, wanted: float) -> None:
    """After some steps of other scores, the wanted share of held-out ones lies above the threshold."""
    config = make_config(router=router, density=0.4, eval_density=wanted, running_rate=0.2)
    state = RoutingState(config, [1, 5, 9], CPU)
    controller = DensityController(state, lambda tensor: tensor)
    for step in range(15):
        for micro_batch in range(2):
            scores = torch.cat([skewed(layer, 2 * step + micro_batch) for layer in state.layers])
            controller.observe(torch.full((3,), 0.4), scores)
        controller.end_step(step)
    for layer, told in state.for_evaluation(15, 1, torch.arange(2000)).items():
        above = (skewed(layer, 999, 20_000) > told.threshold).double().mean()
        assert above == pytest.approx(wanted, abs=0.02)
        assert told.noise is None


def test_the_dial_gives_the_learned_coin_another_density() -> None:
    """The coin's score is the same for every token: its learned bias."""
    config = make_config(router="fixed_input", density=0.4, eval_density=0.7)
    state = make_state(config)
    controller = DensityController(state, lambda tensor: tensor)
    controller.observe(torch.full((LAYERS,), 0.4), torch.full((LAYERS, LENGTH, BATCH), 1.3))
    controller.end_step(0)
    for layer, told in state.for_evaluation(1, BATCH, AT).items():
        router = fresh_router(config, layer)
        torch.nn.init.constant_(router.get_parameter("bias"), 1.3)
        decision = router(normed_tokens(layer), told, 0.4)
        assert share([decision]) == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / LENGTH))


def test_without_the_dial_evaluation_compares_with_the_threshold_of_training() -> None:
    """Which controllers move; the quantile router's is its running quantile."""
    for router in ("gumbel", "sigmoid", "topk", "fixed_input"):
        state = make_state(make_config(router=router, density=0.3))
        state.threshold += 0.7
        assert torch.equal(state.evaluation_thresholds(), state.threshold)
        trained = torch.stack(
            [told.threshold for told in state.for_training(0, KEY, torch.arange(8)).values()]
        )
        assert torch.equal(trained, state.threshold)
    state = make_state(make_config(router="quantile", density=0.25))
    state.margins.copy_(torch.linspace(0, 64, LEVELS).expand_as(state.margins))
    assert state.evaluation_thresholds().tolist() == pytest.approx([48.0] * LAYERS)
    state = make_state(make_config(router="quantile", density=0.25 + 1 / 256))
    state.margins.copy_(torch.linspace(0, 64, LEVELS).expand_as(state.margins))
    assert state.evaluation_thresholds().tolist() == pytest.approx([47.75] * LAYERS), "in between"


def follow(values: list[float], rate: float) -> RoutingState:
    """A state that saw a step of scores that are all the same for each of ``values``."""
    state = make_state(make_config(router="quantile", running_rate=rate))
    controller = DensityController(state, lambda tensor: tensor)
    for step, value in enumerate(values):
        controller.observe(torch.zeros(LAYERS), torch.full((LAYERS, 10, 2), value))
        controller.end_step(step)
    return state


@pytest.mark.parametrize("rate", [0.05, 0.25, 1.0])
def test_running_quantiles_forget_at_their_rate(rate: float) -> None:
    """In the end they are those of exponential smoothing, twice (Brown 1963)."""
    values = torch.randn(600, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    state, once, twice, before = follow(values, rate), 0.0, 0.0, 0.0
    for value in values:
        once += rate * (value - once)
        before, twice = twice, twice + rate * (once - twice)
    level = 2 * once - twice
    torch.testing.assert_close(state.margins, torch.full((LAYERS, LEVELS), level), rtol=0, atol=1e-5)
    trend = twice - before  # for a line both means rise as it does
    torch.testing.assert_close(state.trend, torch.full((LAYERS, LEVELS), trend), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 3, 7, 60])
def test_scores_on_a_line_are_known_beforehand(steps: int) -> None:
    """From the second step on, whatever the rate; and the first replaces what was assumed."""
    state = follow([3.0 - 0.5 * step for step in range(steps)], rate=0.01)
    expected = torch.full((LAYERS,), 3.0 - 0.5 * steps)
    torch.testing.assert_close(state.evaluation_thresholds(), expected, rtol=0, atol=1e-4)
    assert follow([3.0], rate=0.01).evaluation_thresholds().tolist() == [3.0] * LAYERS


def test_quantiles_are_those_of_the_scores() -> None:
    state = make_state(make_config(router="sigmoid"))
    controller = DensityController(state, lambda tensor: tensor)
    scores = torch.randperm(641, generator=torch.Generator().manual_seed(0)).float()
    controller.observe(torch.zeros(LAYERS), scores.view(1, -1, 1).expand(LAYERS, -1, -1))
    controller.end_step(0)
    torch.testing.assert_close(state.margins[3], torch.arange(0, 641, 10).float())


def test_training_draws_by_sample_and_evaluation_by_position_alone() -> None:
    state = make_state(make_config(router="random"))
    layers = torch.tensor(state.layers)
    trained = state.for_training(0, KEY, torch.arange(8))
    for told, expected in zip(trained.values(), logistic(KEY, layers, torch.arange(8)), strict=True):
        assert told.noise is not None
        assert torch.equal(told.noise, expected)
    evaluated = state.for_evaluation(0, 3, torch.arange(8))[4].noise
    assert evaluated is not None
    assert evaluated.shape == (8, 3)
    assert torch.equal(evaluated, evaluated[:, :1].expand(8, 3))
    shorter = state.for_evaluation(0, 1, torch.arange(5))[4].noise
    assert shorter is not None
    assert torch.equal(shorter, evaluated[:5, :1])
    for router, training in (("gumbel", True), ("sigmoid", False), ("quantile", False), ("topk", False)):
        state = make_state(make_config(router=router))
        assert (state.for_training(0, KEY, torch.arange(8))[1].noise is not None) == training
        assert state.for_evaluation(0, 2, torch.arange(8))[1].noise is None


def test_the_state_is_saved_and_loaded_by_layer() -> None:
    config = make_config(router="sigmoid")
    state = make_state(config)
    generator = torch.Generator().manual_seed(0)
    for tensor in state.tensors().values():
        assert tensor.dim() == 1
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    assert set(state.tensors()) == {
        f"layers.{layer}.{name}"
        for layer in range(1, LAYERS + 1) for name in ("threshold", "coefficient", "margins", "trend")
    }  # fmt: skip
    later = RoutingState(config, [3, 7], CPU)
    later.load(state.tensors())
    assert torch.equal(later.threshold, state.threshold[[2, 6]])
    assert torch.equal(later.coefficient, state.coefficient[[2, 6]])
    assert torch.equal(later.margins, state.margins[[2, 6]])
    assert torch.equal(later.trend, state.trend[[2, 6]])
    assert torch.equal(later.target, state.target[[2, 6]])
    moved = state.to(CPU)
    before = state.threshold.clone()
    moved.threshold += 1
    assert torch.equal(state.threshold, before), "a copy"
    moved.load(state.tensors())
    assert all(torch.equal(moved.tensors()[name], tensor) for name, tensor in state.tensors().items())


def test_a_stage_without_routed_layers_has_an_empty_state() -> None:
    state = RoutingState(make_config(), [], CPU)
    assert state.tensors() == {}
    assert state.for_training(0, KEY, torch.arange(8)) == {}
    assert state.for_evaluation(0, 2, torch.arange(8)) == {}
    DensityController(state, lambda tensor: tensor).end_step(0)
