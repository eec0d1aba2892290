"""The routed layer is what its description says: forward and every gradient, against a token-by-token
reference in float64."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from layer_reference import Rule, Shape, run_layer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from skipmega.config import RunConfig, build_config
from skipmega.kernels.attention import document_starts
from skipmega.models.decoder import DecoderStage
from skipmega.models.layer import DecoderLayer, LayerContext, RoutingRecord
from skipmega.parallel.grid import ParallelGrid
from skipmega.routing.noise import NoiseKey, logistic
from skipmega.routing.router import RouterInputs

LENGTH, BATCH, HIDDEN, GROUP, SEED = 12, 2, 16, 6, 77
LAYER = 1  # the routed one of three
DENSITY_WEIGHT = 0.7
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * LENGTH])
EVERYBODY, NOBODY = -50.0, 50.0  # thresholds

ROUTERS: dict[str, dict[str, Any]] = {
    "gumbel": {"router": "gumbel"},
    "sigmoid": {"router": "sigmoid"},
    "sigmoid-bias": {"router": "sigmoid", "density_control": "bias"},
    "quantile": {"router": "quantile"},
    "quantile-running": {"router": "quantile", "quantile_from": "running"},
    "topk": {"router": "topk"},
    "topk-predictor": {"router": "topk", "stand_in": "predictor"},
    "random": {"router": "random"},
    "fixed_input": {"router": "fixed_input"},
    "highway": {"router": "highway"},
    "never": {"router": "never"},
}
WRAPS: dict[str, dict[str, Any]] = {
    "layer": {"wrap": "layer"},
    "mlp": {"wrap": "mlp"},
    "attention": {"wrap": "attention"},
    "layer-executed": {"wrap": "layer", "keys_values": "executed", "group_size": None},
    "attention-executed": {"wrap": "attention", "keys_values": "executed", "group_size": None},
}
OWN_WEIGHTS = {"topk": "score", "highway": "score", "quantile": "twice_score"}


def make_config(routing: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    return build_config(
        {
            "model": {
                "num_layers": 3, "hidden_size": HIDDEN, "num_attention_heads": 4, "ffn_hidden_size": 24,
                "vocab_size": 64, "init_std": 0.3, **model,
            },
            "routing": {
                "router": "gumbel", "group_size": GROUP, "density": 0.5, "temperature": 0.8,
                "z_loss_weight": 0.3, "stand_in_weight": 0.4, **(routing or {}),
            },
            "data": {"sequence_length": LENGTH},
        },
        source="test",
    )  # fmt: skip


def make_layer(config: RunConfig, grid: ParallelGrid) -> DecoderLayer:
    """Norm weights off one and biases off zero, so that leaving them out is seen."""
    layer = DecoderStage(config, grid).layers[str(LAYER)]
    assert isinstance(layer, DecoderLayer)
    generator = torch.Generator().manual_seed(5)
    for norm in (layer.attention_norm, layer.mlp_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
    if layer.router is not None and layer.router.bias is not None:
        torch.nn.init.uniform_(layer.router.bias, -0.5, 0.5, generator=generator)
    return layer


def random_hidden(seed: int = SEED) -> Tensor:
    return torch.randn(LENGTH, BATCH, HIDDEN, generator=torch.Generator().manual_seed(seed))


def random_noise() -> Tensor:
    return logistic(NoiseKey(SEED, torch.tensor([3, 8])), torch.tensor([LAYER]), torch.arange(LENGTH))[0]


@dataclass(frozen=True)
class Case:
    """How a layer is asked."""

    training: bool = True
    threshold: float = 0.1
    noise: Tensor | None = field(default_factory=random_noise)
    documents: Tensor | None = None
    factor: float | None = None
    warmed: float = 1.0

    def inputs(self, config: RunConfig) -> RouterInputs:
        temperature = torch.tensor(config.routing.temperature)
        return RouterInputs(torch.tensor(self.threshold), temperature, self.noise)

    def context(self) -> LayerContext:
        since = None if self.documents is None else document_starts(self.documents)
        return LayerContext(since, self.factor, warmed=self.warmed)


class Outcome(NamedTuple):
    out: Tensor
    density: Tensor
    auxiliary: Tensor
    gradients: dict[str, Tensor]


def objective(out: Tensor, density: Tensor, auxiliary: Tensor) -> Tensor:
    cotangent = random_hidden(SEED + 1).to(out.dtype)
    return (out * cotangent).sum() + DENSITY_WEIGHT * density + auxiliary


def gradients_of(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


def run_skipmega(
    layer: DecoderLayer, config: RunConfig, hidden: Tensor, case: Case
) -> tuple[Outcome, RoutingRecord]:
    layer.train(case.training)
    hidden = hidden.clone().requires_grad_()
    out, record = layer(hidden, case.inputs(config), case.context())
    density = record.chosen.mean()
    gradients = gradients_of(
        objective(out, density, record.auxiliary), {"hidden": hidden, **dict(layer.named_parameters())}
    )
    return Outcome(out.detach(), density.detach(), record.auxiliary.detach(), gradients), record


def rule_of(config: RunConfig, case: Case) -> Rule:
    routing, density = config.routing, config.densities[LAYER]
    density = density + (1 - density) * (1 - case.warmed)
    group_size = routing.group_size or LENGTH
    capacity = None
    if case.training and routing.router == "topk":
        capacity = math.ceil(round(density * group_size, 6))
    elif case.factor is not None:
        capacity = max(math.ceil(round(case.factor * density * group_size, 6)), routing.min_capacity)
    weight = routing.update_weight or OWN_WEIGHTS.get(routing.router, "straight_through")
    ranked = routing.router in ("quantile", "topk")
    return Rule(
        router=routing.router,
        update_weight=weight,
        centred=routing.density_control == "bias" or (ranked and weight == "straight_through"),
        density=density,
        group_size=group_size,
        capacity=capacity,
        training=case.training,
        threshold=case.threshold,
        temperature=routing.temperature,
        wrap=routing.wrap,
        keys_values=routing.keys_values,
        router_input=routing.router_input,
        dense=routing.gradient == "dense" or routing.router == "highway",
        quantile_from=routing.quantile_from,
        stand_in=routing.stand_in,
        stand_in_weight=routing.stand_in_weight,
        z_loss_weight=routing.z_loss_weight,
    )


def run_reference(
    layer: DecoderLayer, config: RunConfig, hidden: Tensor, case: Case
) -> tuple[Outcome, Tensor]:
    model = config.model
    kv_heads = model.num_key_value_heads or model.num_attention_heads
    head_size = model.head_dim or HIDDEN // model.num_attention_heads
    shape = Shape(model.num_attention_heads, kv_heads, head_size, model.activation)
    leaves = {"hidden": hidden, **dict(layer.named_parameters())}
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in leaves.items()}
    weights = {name: tensor for name, tensor in leaves.items() if name != "hidden"}
    noise = None if case.noise is None else case.noise.double()
    result = run_layer(leaves["hidden"], weights, shape, rule_of(config, case), case.documents, noise)
    gradients = gradients_of(objective(result.out, result.density, result.auxiliary), leaves)
    outcome = Outcome(result.out.detach(), result.density.detach(), result.auxiliary.detach(), gradients)
    return outcome, result.executed


class Seen(NamedTuple):
    executed: Tensor  # [s, b]
    density: float
    gradients: dict[str, Tensor]


def check(config: RunConfig, grid: ParallelGrid, case: Case) -> Seen:
    """Compare both."""
    layer, hidden = make_layer(config, grid), random_hidden()
    found, record = run_skipmega(layer, config, hidden, case)
    expected, executed = run_reference(layer, config, hidden, case)
    assert torch.equal(record.executed, executed)
    torch.testing.assert_close(found.density.double(), expected.density, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.auxiliary.double(), expected.auxiliary, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.out.double(), expected.out, rtol=1e-5, atol=1e-5)
    if config.routing.wrap == "layer":
        assert torch.equal(found.out[~executed], hidden[~executed]), "skipped tokens are bit-identical"
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        error = (found.gradients[name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm().clamp(min=1e-3), f"gradient of {name} is off by {error:.1e}"
    return Seen(executed, float(found.density), found.gradients)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_routes_every_wrap(grid: ParallelGrid, router: str, wrap: str, training: bool) -> None:
    """With documents and a capacity of 3 in 4, which the routers of no fixed share overflow somewhere."""
    if router == "highway" and wrap.endswith("executed"):
        pytest.skip("refused: everybody runs")
    config = make_config({**ROUTERS[router], **WRAPS[wrap]})
    seen = check(config, grid, Case(training, documents=DOCUMENTS, factor=1.5 if training else None))
    if router not in ("highway", "never"):
        assert 0 < seen.executed.sum() < seen.executed.numel()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one", "documents"])
@pytest.mark.parametrize("wrap", ["layer", "layer-executed"])
def test_the_layer_may_have_every_shape(
    grid: ParallelGrid, activation: str, kv_heads: int, documents: Tensor | None, wrap: str
) -> None:
    """Capacity of 3 of 6: some groups overflow, others are padded, as asserted."""
    config = make_config(WRAPS[wrap], activation=activation, num_key_value_heads=kv_heads, head_dim=6)
    executed, density, _ = check(config, grid, Case(threshold=-0.5, documents=documents, factor=0.8))
    assert 0 < executed.float().mean() < density < 1, "a token was dropped"
    if wrap == "layer":
        per_group = executed.view(-1, GROUP, BATCH).sum(1)
        assert (per_group == 3).any()


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("factor", [0.3, 1.0, 2.0, None])
@pytest.mark.parametrize("threshold", [NOBODY, 0.1, EVERYBODY], ids=["none", "some", "all"])
def test_every_density_meets_every_capacity(
    grid: ParallelGrid, wrap: str, factor: float | None, threshold: float
) -> None:
    config = make_config(WRAPS[wrap])
    case = Case(threshold=threshold, factor=factor, documents=DOCUMENTS)
    executed, density, _ = check(config, grid, case)
    if threshold == 0.1:
        assert 0.2 < density < 0.8
    else:
        assert density == float(threshold == EVERYBODY)
    if threshold == EVERYBODY:
        group = config.routing.group_size or LENGTH
        kept = group if factor is None else min(group, math.ceil(factor * group / 2))
        assert (executed.view(-1, group, BATCH).sum(1) == kept).all()


@pytest.mark.parametrize("router", ["quantile", "topk", "topk-predictor"])
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("group_size", [GROUP, None])
def test_ranking_routers_at_every_density(
    grid: ParallelGrid, router: str, density: float, group_size: int | None
) -> None:
    """The capacity of topk is what it chooses, whatever the factor."""
    config = make_config({**ROUTERS[router], "density": density, "group_size": group_size})
    executed, chosen, _ = check(config, grid, Case(factor=0.1 if router != "quantile" else 2.0))
    if router == "quantile":
        assert round(chosen * LENGTH * BATCH) == math.ceil(density * LENGTH * BATCH)
    else:
        size = group_size or LENGTH
        assert (executed.view(-1, size, BATCH).sum(1) == math.ceil(density * size)).all()


@pytest.mark.parametrize("router", ["gumbel", "sigmoid", "quantile", "topk", "fixed_input"])
@pytest.mark.parametrize("gradient", ["packed", "dense"])
@pytest.mark.parametrize("weight", ["straight_through", "score", "twice_score"])
@pytest.mark.parametrize("wrap", ["layer", "mlp", "attention"])
def test_updates_are_weighted_and_teach_the_router(
    grid: ParallelGrid, router: str, gradient: str, weight: str, wrap: str
) -> None:
    """Under a capacity that drops some: dropped tokens teach like skipped ones."""
    if router == "fixed_input" and weight != "straight_through":
        pytest.skip("refused: there is no score")
    routing = {"router": router, "update_weight": weight, "gradient": gradient, "wrap": wrap}
    executed, density, _ = check(make_config(routing), grid, Case(factor=0.6, threshold=-0.3))
    if router != "topk":
        assert 0 < executed.float().mean() < density, "a token was dropped"


@pytest.mark.parametrize(
    "options",
    [
        {"router_input": "raw"},
        {"router_bias": True},
        {"router_input": "raw", "router_bias": True, "temperature": 2.5},
    ],
    ids=["raw", "bias", "raw-bias-hot"],
)
@pytest.mark.parametrize("router", ["gumbel", "sigmoid-bias", "quantile", "topk-predictor", "highway"])
def test_the_score_may_be_of_raw_input_and_have_a_bias(
    grid: ParallelGrid, router: str, options: dict[str, Any]
) -> None:
    check(make_config({**ROUTERS[router], **options}), grid, Case())


@pytest.mark.parametrize("router", ["gumbel", "sigmoid", "quantile-running", "topk", "fixed_input"])
@pytest.mark.parametrize("threshold", [-1.5, 0.0, 0.7])
def test_evaluation_thresholds_the_score(grid: ParallelGrid, router: str, threshold: float) -> None:
    """Without noise but for the coin; with a capacity of its own, and none of a router's own losses."""
    config = make_config(ROUTERS[router])
    noise = random_noise() if router == "fixed_input" else None
    check(config, grid, Case(False, threshold, noise, DOCUMENTS, factor=0.9))


def test_capacity_has_a_minimum(grid: ParallelGrid) -> None:
    """Which raises neither the slots of topk nor a capacity over it."""
    for router, factor, slots in (("gumbel", 0.3, 4), ("gumbel", 1.7, 6), ("topk", 0.3, 3)):
        config = make_config({"router": router, "min_capacity": 4})
        executed, _, _ = check(config, grid, Case(threshold=EVERYBODY, factor=factor))
        assert (executed.view(-1, GROUP, BATCH).sum(1) == slots).all()


@pytest.mark.parametrize("router", ["gumbel", "quantile", "topk"])
@pytest.mark.parametrize(("warmed", "share"), [(0.0, 1.0), (0.5, 4 / 6), (1.0, 2 / 6)])
def test_a_layer_that_warms_up_has_the_density_between(
    grid: ParallelGrid, router: str, warmed: float, share: float
) -> None:
    """For what ranks tokens, and for the capacity."""
    config = make_config({"router": router, "density": 2 / 6})
    executed, chosen, _ = check(config, grid, Case(warmed=warmed, factor=1.0, threshold=EVERYBODY))
    if router == "quantile":
        assert chosen == pytest.approx(share)
    else:
        assert (executed.view(-1, GROUP, BATCH).sum(1) == round(share * GROUP)).all()


def test_the_record_counts_what_was_computed(grid: ParallelGrid) -> None:
    """Padding included; all rows where all are computed."""
    for options, factor, rows in (
        ({}, 1.0, 3 * 2 * BATCH), ({"group_size": None}, 0.5, 3 * BATCH),
        ({"gradient": "dense"}, 1.0, LENGTH * BATCH), ({"router": "highway"}, 1.0, LENGTH * BATCH),
    ):  # fmt: skip
        config = make_config(options)
        _, record = run_skipmega(make_layer(config, grid), config, random_hidden(), Case(factor=factor))
        assert record.slots == rows
    config = make_config()
    _, record = run_skipmega(make_layer(config, grid), config, random_hidden(), Case())
    assert record.slots == BATCH * int(record.executed.sum(0).max()), "dropless: what the fullest needs"


def test_the_router_learns_from_executed_tokens_through_the_straight_through_factor(
    grid: ParallelGrid,
) -> None:
    """Without a density penalty, the language-model loss alone moves the router, and only if a token ran -
    or if every token is computed."""
    for gradient, moves_without in (("packed", False), ("dense", True)):
        config = make_config({"gradient": gradient})
        layer, hidden = make_layer(config, grid), random_hidden()
        assert layer.router is not None
        for threshold, moves in ((10.0, moves_without), (-3.0, True)):
            case = Case(threshold=threshold, noise=None)
            out, record = layer(hidden, case.inputs(config), case.context())
            assert bool(record.executed.any()) == (threshold < 0)
            weight = layer.router.get_parameter("weight")
            (found,) = torch.autograd.grad((out * random_hidden(1)).sum(), weight)
            assert bool(found.any()) == moves


@pytest.mark.parametrize("keys_values", ["all", "executed"])
def test_a_skipped_token_is_visible_as_context_unless_only_executed_ones_are(
    grid: ParallelGrid, keys_values: str
) -> None:
    """Changing a skipped token changes what later executed tokens of its document read."""
    config = make_config({"keys_values": keys_values, "group_size": None})
    layer, hidden, case = make_layer(config, grid), random_hidden(), Case(threshold=0.0, noise=None)
    before, record = layer(hidden, case.inputs(config), case.context())
    skipped = int((~record.executed[:, 0]).nonzero()[0])
    changed = hidden.clone()
    changed[skipped, 0] *= 0.5
    changed[skipped, 0, 1] += 0.3
    after, again = layer(changed, case.inputs(config), case.context())
    assert torch.equal(again.executed, record.executed)
    later = [i for i in range(skipped + 1, LENGTH) if record.executed[i, 0]]
    assert later
    for i in later:
        assert torch.equal(before[i, 0], after[i, 0]) == (keys_values == "executed")
    assert torch.equal(before[:skipped, 0], after[:skipped, 0])
    assert torch.equal(before[:, 1], after[:, 1])


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_dense_layer_is_the_routed_one_that_everybody_runs(grid: ParallelGrid, wrap: str) -> None:
    config, case = make_config(WRAPS[wrap]), Case(threshold=EVERYBODY, documents=DOCUMENTS)
    layer, hidden = make_layer(config, grid), random_hidden()
    routed, _ = layer(hidden, case.inputs(config), case.context())
    layer.router = None
    dense, record = layer(hidden, None, case.context())
    assert record is None
    torch.testing.assert_close(dense, routed)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("router", ROUTERS)
def test_recomputation_keeps_decisions_and_gradients(grid: ParallelGrid, router: str, wrap: str) -> None:
    if router == "highway" and wrap.endswith("executed"):
        pytest.skip("refused: everybody runs")
    config, case = make_config({**ROUTERS[router], **WRAPS[wrap]}), Case(documents=DOCUMENTS, factor=1.0)
    layer = make_layer(config, grid)
    executed: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        out, record = layer(hidden, case.inputs(config), case.context())
        executed.append(record.executed)
        return objective(out, record.chosen.mean(), record.auxiliary)

    hidden = random_hidden().requires_grad_()
    leaves = {"hidden": hidden, **dict(layer.named_parameters())}
    plain = gradients_of(forward(hidden), leaves)
    recomputed = checkpoint(forward, hidden, use_reentrant=False)
    again = gradients_of(recomputed, leaves)
    assert len(executed) == 3, "once, again, and recomputed"
    assert all(torch.equal(each, executed[0]) for each in executed)
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())
