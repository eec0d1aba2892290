"""Stacks of layers, forward and backward: skipmega's own and the peers'."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from skipmega.config import RunConfig
from skipmega.experiments.speed.bench import GROUPED, Bench, Row, fill, precision, time_backward
from skipmega.experiments.speed.peers.masked import Masked
from skipmega.experiments.speed.peers.mixture_of_depths import MixtureOfDepths
from skipmega.experiments.speed.peers.one_expert import OneExpert
from skipmega.experiments.speed.peers.packed import Packed
from skipmega.experiments.speed.peers.plain import PlainLayer
from skipmega.experiments.speed.peers.random_ltd import RandomTokens
from skipmega.kernels.attention import AttentionBackend, choose_attention
from skipmega.models.flops import layer_flops
from skipmega.models.layer import DecoderLayer, LayerContext
from skipmega.models.rotary import rotary_table
from skipmega.parallel.grid import ParallelGrid
from skipmega.parallel.sequence import SequenceShards
from skipmega.routing.noise import NoiseKey
from skipmega.routing.state import RoutingState

DENSITIES = (0.5, 0.25, 0.125)
HEADS: dict[str, list[str]] = {"MHA": [], "GQA": GROUPED}
DENSE = ["routing.router=always"]
MIXTURE = ["routing.router=topk", "routing.keys_values=executed"]
Maker = Callable[[RunConfig, float, AttentionBackend], nn.Module]


def layer_rows() -> list[Row]:
    """Rows of ``bench.py layer``: dense and routed, both kinds of heads, and Mixture-of-Depths' router."""
    rows = []
    for heads, overrides in HEADS.items():
        rows.append(Row("layer", f"{heads} dense", partial(_own, overrides=[*overrides, *DENSE])))
        for density in DENSITIES:
            routed = [*overrides, f"routing.density={density}"]
            rows.append(Row("layer", f"{heads} {density}", partial(_own, overrides=routed)))
    for density in (0.5, 0.125):
        routed = [*MIXTURE, f"routing.density={density}"]
        rows.append(Row("layer", f"own mixture-of-depths {density}", partial(_own, overrides=routed)))
    doubled = partial(_own, overrides=["routing.density=0.5"], times=2)
    return [*rows, Row("layer", "MHA 0.5, twice as many layers", doubled)]


def peer_rows() -> list[Row]:
    """Rows of ``bench.py peers``: every peer at two densities, without grouped heads."""
    own: list[Row] = [Row("peers", "dense", partial(_own, overrides=DENSE))]
    own += [Row("peers", f"own {p}", partial(_own, overrides=[f"routing.density={p}"])) for p in (0.5, 0.125)]
    plain = Row("peers", "plain dense", partial(_peer, make=_plain, density=1.0, overrides=DENSE))
    return [*own, plain] + [
        Row("peers", f"{name} {density}", partial(_peer, make=make, density=density, overrides=overrides))
        for name, (make, overrides) in PEERS.items()
        for density in (0.5, 0.125)
    ]


def _plain(config: RunConfig, density: float, attention: AttentionBackend) -> nn.Module:
    return PlainLayer(config.model, config.data.sequence_length)


def _mixture(config: RunConfig, density: float, attention: AttentionBackend) -> nn.Module:
    return MixtureOfDepths(config.model, config.data.sequence_length, density)


def _masked(config: RunConfig, density: float, attention: AttentionBackend) -> nn.Module:
    return Masked(config.model, config.data.sequence_length)


def _packed(config: RunConfig, density: float, attention: AttentionBackend) -> nn.Module:
    return Packed(config.model, config.data.sequence_length, density, attention)


def _random(config: RunConfig, density: float, attention: AttentionBackend) -> nn.Module:
    sequences = config.training.micro_batch_size
    return RandomTokens(config.model, config.data.sequence_length, density, sequences)


def _expert(config: RunConfig, density: float, attention: AttentionBackend) -> nn.Module:
    return OneExpert(config.model, config.data.sequence_length, density)


# overrides tell the account of FLOPs what each one computes
PEERS: dict[str, tuple[Maker, list[str]]] = {
    "mixture-of-depths": (_mixture, MIXTURE),
    "packed": (_packed, []),
    "masked": (_masked, []),
    "one-expert MoE": (_expert, ["routing.wrap=mlp"]),
    "random-LTD": (_random, MIXTURE),
}


def _own(bench: Bench, overrides: Sequence[str], times: int = 1) -> dict[str, Any]:
    """skipmega's layers, each a compiled program, all of them one graph as in training."""
    config = bench.config(f"model.num_layers={times * bench.layers}", *overrides)
    device, length = bench.grid.device, config.data.sequence_length
    size, dtype = config.training.micro_batch_size, precision(config)
    layers, run = own_stack(config, bench.grid)
    hidden = torch.randn(length, size, config.model.hidden_size, device=device, dtype=dtype)
    executed: list[float] = []

    def forward(inputs: Tensor) -> Tensor:
        out, shares = run(inputs)
        executed[:] = shares
        return out

    captured = config.training.cuda_graphs
    measured = time_backward(forward, list(layers.parameters()), hidden.requires_grad_(), bench, captured)
    shares = [float(share) for share in executed] or [1.0] * len(layers)
    per_token = sum(layer_flops(config, share) for share in shares)
    return {**measured, **_account(config, per_token), "executed": sum(shares) / len(shares)}


def own_stack(
    config: RunConfig, grid: ParallelGrid
) -> tuple[nn.ModuleList, Callable[[Tensor], tuple[Tensor, list[Any]]]]:
    """``model.num_layers`` layers, and what runs them: from [s, b, hidden] to the same shape, and
    the share of tokens that each routed layer executes."""
    device, length = grid.device, config.data.sequence_length
    shards = SequenceShards.of(grid)
    layers = nn.ModuleList(
        DecoderLayer(config, config.densities.get(i), None, shards) for i in range(config.model.num_layers)
    )
    layers.to(device, precision(config))
    fill(layers.parameters())
    compiled = config.training.compile
    runs = [torch.compile(layer, dynamic=False) if compiled else layer for layer in layers]
    state = RoutingState(config, config.routed_layers, device)
    key = NoiseKey(0, torch.arange(config.training.micro_batch_size, device=device))
    inputs = state.for_training(0, key, torch.arange(length, device=device))
    model = config.model
    table = rotary_table(length, model.head_size, model.rope_theta, device)
    context = LayerContext(None, config.routing.capacity_factor, attention_on(grid, config), table)

    def run(hidden: Tensor) -> tuple[Tensor, list[Any]]:
        shares = []
        for i, layer in enumerate(runs):
            hidden, record = layer(hidden, inputs.get(i), context)
            if record is not None:
                shares.append(record.executed.float().mean())
        return hidden, shares

    return layers, run


def _peer(bench: Bench, make: Maker, density: float, overrides: Sequence[str]) -> dict[str, Any]:
    config = bench.config(f"model.num_layers={bench.layers}", f"routing.density={density}", *overrides)
    device, size = bench.grid.device, config.training.micro_batch_size
    attention = choose_attention("auto", device, config.training.compile, config.model.head_size)
    layers = nn.ModuleList(make(config, density, attention) for _ in range(bench.layers))
    layers.to(device, precision(config))
    fill(layers.parameters())
    runs = [_compiled(layer) if config.training.compile else layer for layer in layers]
    shape = (size, config.data.sequence_length, config.model.hidden_size)
    hidden = torch.randn(shape, device=device, dtype=precision(config))

    def forward(inputs: Tensor) -> Tensor:
        for layer in runs:
            inputs = layer(inputs)
        return inputs

    captured = config.training.cuda_graphs and not any(map(_waits_for_the_device, layers))
    measured = time_backward(forward, list(layers.parameters()), hidden.requires_grad_(), bench, captured)
    per_token = bench.layers * layer_flops(config, density)
    return {**measured, **_account(config, per_token), "executed": density}


def _compiled(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """As a whole, unless only parts of it can be."""
    if not _waits_for_the_device(layer):
        return torch.compile(layer, dynamic=False)
    layer.compile_parts()
    return layer


def _waits_for_the_device(layer: nn.Module) -> TypeGuard[RandomTokens | OneExpert]:
    """Whether a peer reads numbers of tokens on the host, so that it is no single program, nor a graph."""
    return isinstance(layer, RandomTokens | OneExpert)


def attention_on(grid: ParallelGrid, config: RunConfig) -> AttentionBackend:
    """The implementation that training takes."""
    training = config.training
    return choose_attention(training.attention, grid.device, training.compile, config.model.head_size)


def _account(config: RunConfig, flops_per_token: float) -> dict[str, float]:
    tokens = config.training.micro_batch_size * config.data.sequence_length
    return {"flops": 3 * flops_per_token * tokens, "layers": config.model.num_layers}
