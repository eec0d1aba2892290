"""What needs no GPU of CUDA graphs: what goes in and out of them, and the parameters' stand-ins."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from skipmega.config import load_config
from skipmega.errors import ConfigError
from skipmega.models.graphs import LayerGraphs, _Inputs, _Pair, _Replay
from skipmega.models.layer import LayerContext
from skipmega.routing.router import RouterInputs
from skipmega.training.engine import TrainingEngine

HIDDEN = torch.randn(4, 2, 8)
SINCE = torch.tensor([[0, 0, 2, 2], [0, 1, 1, 3]])


def router_inputs(layer: int, noisy: bool) -> RouterInputs:
    noise = torch.randn(4, 2) if noisy else None
    return RouterInputs(torch.tensor(float(layer)), torch.tensor(0.5), noise)


@pytest.mark.parametrize("since", [None, SINCE])
@pytest.mark.parametrize("routed", [[], [1, 3]])
@pytest.mark.parametrize("noisy", [False, True])
def test_layers_see_what_they_were_given(since: torch.Tensor | None, routed: list[int], noisy: bool) -> None:
    inputs = {layer: router_inputs(layer, noisy) for layer in routed}
    context = LayerContext(since, 1.0, positions=torch.arange(4))
    hidden, restored, of_routers = _Inputs.of(HIDDEN, context, inputs).restored()
    assert hidden is HIDDEN
    assert restored == context
    assert list(of_routers) == routed
    for layer, given in inputs.items():
        torch.testing.assert_close(of_routers[layer], given, rtol=0, atol=0)


def run_nothing(*arguments: Any) -> Any:
    raise AssertionError("nothing is captured without a GPU")


def test_no_gradient_reaches_the_parameters_while_others_stand_in() -> None:
    layers = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2)]
    own = [dict(layer.named_parameters()) for layer in layers]
    sums = {p: torch.zeros_like(p) for layer in layers for p in layer.parameters()}

    graphs = LayerGraphs(run_nothing, layers, sums)
    with graphs._stand_ins() as stand_ins:
        loss = layers[1](layers[0](HIDDEN)).square().sum()
        gradients = torch.autograd.grad(loss, stand_ins)
        assert all(p.grad is None and p not in sums for layer in layers for p in layer.parameters())
        assert [p.data_ptr() for p in stand_ins] == [p.data_ptr() for p in sums]
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    for layer, parameters in zip(layers, own, strict=True):
        assert all(p is parameters[name] for name, p in layer.named_parameters())


def test_gradients_in_bf16_are_added_to_sums_in_fp32() -> None:
    layers = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2)]
    sums = {p: torch.randn_like(p) for layer in layers for p in layer.parameters()}
    before = [total.clone() for total in sums.values()]
    gradients = [torch.randn_like(p).bfloat16() if p.shape != (8, 8) else None for p in sums]
    graphs = LayerGraphs(run_nothing, layers, sums)
    graphs._add(gradients, torch.zeros_like)
    torch.testing.assert_close(list(sums.values()), before, rtol=0, atol=0, msg="rehearsed on others")
    graphs._add(gradients)
    for total, old, gradient in zip(sums.values(), before, gradients, strict=True):
        torch.testing.assert_close(total, old if gradient is None else old + gradient.float())


def test_graphs_without_compiled_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.cuda_graphs=true.*set training\.compile=true"):
        load_config(None, ["training.cuda_graphs=true"])


def test_graphs_without_a_gpu_are_refused() -> None:
    config = load_config(None, ["training.compile=true", "training.cuda_graphs=true"])
    with pytest.raises(ConfigError, match=r"training\.cuda_graphs=true needs a GPU.*leave it out"):
        TrainingEngine(config, cast(Any, SimpleNamespace(device=torch.device("cpu"))))


def test_a_replay_hands_over_inputs_outputs_and_gradients() -> None:
    """The graphs are those of 3 x + y, of which y has no gradient; what they read and write stays theirs."""
    x, y, out, upstream, of_x = (torch.zeros(2, 3) for _ in range(5))
    given = _Inputs([x.requires_grad_(), y], LayerContext(None, None), [], noisy=False)
    forward = SimpleNamespace(replay=lambda: out.copy_(3 * x.detach() + y))
    backward = SimpleNamespace(replay=lambda: of_x.copy_(3 * upstream))
    pair = _Pair(cast(Any, forward), cast(Any, backward), given, [out], [upstream], of_x, counts={})
    for _ in range(2):
        tokens, others = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
        (result,) = _Replay.apply(pair, tokens, others)
        assert pair.in_flight
        torch.testing.assert_close(result, 3 * tokens + others)
        weights = torch.randn(2, 3)
        (gradient,) = torch.autograd.grad((result * weights).sum(), tokens)
        assert not pair.in_flight
        of_x.zero_()  # as the next replay writes over it
        torch.testing.assert_close(gradient, 3 * weights)
    with pytest.raises(AssertionError):
        _Replay.apply(pair, torch.randn(1, 3, requires_grad=True), torch.randn(2, 3))
