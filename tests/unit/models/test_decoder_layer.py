"""The packed layer is the masked one: forward and every gradient, against a token-by-token reference."""

from typing import Any, NamedTuple

import pytest
import torch
from layer_reference import Shape, run_layer
from torch import Tensor

from skipmega.config import RunConfig, build_config
from skipmega.kernels.attention import document_starts
from skipmega.models.decoder import DecoderStage
from skipmega.models.layer import DecoderLayer, LayerContext, RoutingRecord
from skipmega.parallel.grid import ParallelGrid
from skipmega.routing.noise import NoiseKey, logistic

LENGTH, BATCH, HIDDEN, GROUP, SEED = 12, 2, 16, 6, 77
SAMPLES = torch.tensor([3, 8])
LAYER = 1  # the routed one of three
DENSITY_WEIGHT = 0.7


def make_config(**sections: dict[str, Any]) -> RunConfig:
    values: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 3,
            "hidden_size": HIDDEN,
            "num_attention_heads": 4,
            "ffn_hidden_size": 24,
            "vocab_size": 64,
            "init_std": 0.3,
        },
        "routing": {"group_size": GROUP, "density": 0.5, "temperature": 0.8},
        "data": {"sequence_length": LENGTH},
    }
    for section, fields in sections.items():
        values[section] = values[section] | fields
    return build_config(values, source="test")


def make_layer(config: RunConfig, grid: ParallelGrid) -> DecoderLayer:
    """Norm weights off one, so that leaving them out is seen."""
    layer = DecoderStage(config, grid).layers[str(LAYER)]
    assert isinstance(layer, DecoderLayer)
    generator = torch.Generator().manual_seed(5)
    for norm in (layer.attention_norm, layer.mlp_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
    return layer


def random_hidden() -> Tensor:
    return torch.randn(LENGTH, BATCH, HIDDEN, generator=torch.Generator().manual_seed(SEED))


def force_density(layer: DecoderLayer, hidden: Tensor, margin: float) -> Tensor:
    """Make every token's margin about ``margin`` through the router: channel 0 of the input is one large
    constant, so it is nearly the same in all normalised tokens, and only it is read."""
    hidden = hidden.clone()
    hidden[..., 0] = 20.0
    assert layer.router is not None
    with torch.no_grad():
        layer.router.weight.mul_(0.01)
        layer.router.weight[1, 0] = margin / (HIDDEN**0.5 * layer.attention_norm.weight[0])
    return hidden


class Outcome(NamedTuple):
    out: Tensor
    density: Tensor
    gradients: dict[str, Tensor]


def cotangent() -> Tensor:
    return torch.randn(LENGTH, BATCH, HIDDEN, generator=torch.Generator().manual_seed(SEED + 1))


def run_packed(
    layer: DecoderLayer, hidden: Tensor, noise: Tensor | None, context: LayerContext
) -> tuple[Outcome, RoutingRecord]:
    hidden = hidden.clone().requires_grad_()
    out, record = layer(hidden, noise, context)
    density = record.chosen.mean()
    leaves = {"hidden": hidden, **dict(layer.named_parameters())}
    loss = (out * cotangent()).sum() + DENSITY_WEIGHT * density
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return Outcome(out.detach(), density.detach(), gradients), record


def run_reference(
    layer: DecoderLayer,
    config: RunConfig,
    hidden: Tensor,
    noise: Tensor | None,
    documents: Tensor | None,
    capacity: int | None,
) -> tuple[Outcome, Tensor]:
    model = config.model
    shape = Shape(
        model.num_attention_heads, model.kv_heads, model.head_size, model.activation,
        temperature=config.routing.temperature,
    )  # fmt: skip
    leaves = {"hidden": hidden, **dict(layer.named_parameters())}
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in leaves.items()}
    weights = {name: tensor for name, tensor in leaves.items() if name != "hidden"}
    result = run_layer(leaves["hidden"], weights, shape, documents, noise, GROUP, capacity)
    loss = (result.out * cotangent().double()).sum() + DENSITY_WEIGHT * result.density
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }
    return Outcome(result.out.detach(), result.density.detach(), gradients), torch.tensor(result.executed)


def check_layer(
    config: RunConfig, grid: ParallelGrid, *, factor: float | None, capacity: int | None,
    documents: Tensor | None = None, margin: float | None = None, sample: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compare both; returns the executed tokens [s, b] and the share chosen."""
    layer, hidden = make_layer(config, grid), random_hidden()
    if margin is not None:
        hidden = force_density(layer, hidden, margin)
    noise = logistic(NoiseKey(SEED, SAMPLES), torch.tensor([LAYER]), LENGTH)[0] if sample else None
    context = LayerContext(None if documents is None else document_starts(documents), factor)
    found, record = run_packed(layer, hidden, noise, context)
    expected, executed = run_reference(layer, config, hidden, noise, documents, capacity)
    assert torch.equal(record.executed, executed)
    torch.testing.assert_close(found.density.double(), expected.density, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.out.double(), expected.out, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.out[~executed], hidden[~executed]), "skipped tokens are bit-identical"
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        error = (found.gradients[name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm().clamp(min=1e-3), f"gradient of {name} is off by {error:.1e}"
    return executed, found.density


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * LENGTH])


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one", "documents"])
def test_packed_is_masked_for_every_shape(
    grid: ParallelGrid, activation: str, kv_heads: int, documents: Tensor | None
) -> None:
    """Capacity of 3 of 6: some groups overflow, others are padded, as asserted."""
    config = make_config(model={"activation": activation, "num_key_value_heads": kv_heads, "head_dim": 6})
    executed, density = check_layer(config, grid, factor=1.0, capacity=3, documents=documents)
    per_group = executed.view(-1, GROUP, BATCH).sum(1)
    assert (per_group == 3).any()
    assert 0 < executed.float().mean() < density < 1, "a token was dropped"


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one", "documents"])
@pytest.mark.parametrize(("factor", "capacity"), [(0.3, 1), (1.0, 3), (2.0, 6), (None, None)])
@pytest.mark.parametrize("margin", [-30.0, 0.0, 30.0], ids=["none", "mixed", "all"])
def test_packed_is_masked_at_every_density_and_capacity(
    grid: ParallelGrid, factor: float | None, capacity: int | None, margin: float, documents: Tensor | None
) -> None:
    executed, density = check_layer(
        make_config(), grid, factor=factor, capacity=capacity, margin=margin, documents=documents
    )
    if margin:
        assert density == float(margin > 0)
    else:
        assert 0.2 < density < 0.8
    if margin > 0:
        kept = GROUP if capacity is None else capacity
        assert (executed.view(-1, GROUP, BATCH).sum(1) == kept).all()


def test_greedy_decisions_are_masked_too(grid: ParallelGrid) -> None:
    executed, _ = check_layer(make_config(), grid, factor=None, capacity=None, sample=False)
    assert 0 < executed.sum() < executed.numel()


def test_the_router_learns_from_executed_tokens_through_the_straight_through_factor(
    grid: ParallelGrid,
) -> None:
    """Without a density penalty, the language-model loss alone moves the router, and only if a token ran."""
    layer, hidden = make_layer(make_config(), grid), random_hidden()
    assert layer.router is not None
    for margin, moves in ((-30.0, False), (2.0, True)):
        out, _ = layer(force_density(layer, hidden, margin), None, LayerContext(None, None))
        (gradient,) = torch.autograd.grad((out * cotangent()).sum(), layer.router.weight)
        assert bool(gradient.any()) == moves


def test_a_skipped_token_stays_visible_as_context(grid: ParallelGrid) -> None:
    """Changing a skipped token changes what later executed tokens of its document read."""
    layer, hidden = make_layer(make_config(), grid), random_hidden()
    context = LayerContext(None, None)
    before, record = layer(hidden, None, context)
    skipped = int((~record.executed[:, 0]).nonzero()[0])
    later = [i for i in range(skipped + 1, LENGTH) if record.executed[i, 0]]
    changed = hidden.clone()
    changed[skipped, 0] *= -0.5
    after, again = layer(changed, None, context)
    same = [i for i in later if again.executed[i, 0]]
    assert same
    assert all(not torch.equal(before[i, 0], after[i, 0]) for i in same)
    assert torch.equal(before[:skipped, 0], after[:skipped, 0])
    assert torch.equal(before[:, 1], after[:, 1])


def test_a_dense_layer_is_the_routed_one_that_everybody_runs(grid: ParallelGrid) -> None:
    config = make_config()
    layer, hidden = make_layer(config, grid), random_hidden()
    hidden = force_density(layer, hidden, 30.0)
    context = LayerContext(document_starts(DOCUMENTS), None)
    routed, _ = layer(hidden, None, context)
    layer.router = None
    dense, record = layer(hidden, None, context)
    assert record is None
    torch.testing.assert_close(dense, routed)
