"""Peers compute what they claim: against float64 arithmetic of their descriptions, a token at a time."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.ops.random_ltd import dropping_utils
from torch import Tensor, nn

from skipmega.config import ModelConfig
from skipmega.experiments.speed.peers.masked import Masked
from skipmega.experiments.speed.peers.mixture_of_depths import MixtureOfDepths
from skipmega.experiments.speed.peers.one_expert import OneExpert
from skipmega.experiments.speed.peers.packed import Packed
from skipmega.experiments.speed.peers.plain import PlainLayer
from skipmega.experiments.speed.peers.random_ltd import RandomTokens
from skipmega.parallel.grid import ParallelGrid

BATCH, LENGTH, KEPT = 2, 11, 4
DENSITY = KEPT / LENGTH
SHAPES = {
    "swiglu-gqa": ModelConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, ffn_hidden_size=20, activation="swiglu"
    ),
    "gelu": ModelConfig(hidden_size=24, num_attention_heads=3, ffn_hidden_size=20),
}


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return SHAPES[request.param]


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight


def turned(vector: Tensor, position: int) -> Tensor:
    """One head's channels i and i + d/2 as a complex number, turned by its angle."""
    first, second = vector.chunk(2)
    angle = position * 10_000.0 ** (-torch.arange(len(first), dtype=torch.float64) / len(first))
    spun = torch.polar(torch.ones_like(angle), angle) * torch.complex(first, second)
    return torch.cat([spun.real, spun.imag])


def attention(layer: PlainLayer, asking: Tensor, known: Tensor, at: int, positions: Sequence[int]) -> Tensor:
    """The output for one row ``asking`` [d] at position ``at``, of the rows ``known`` [n, d]."""
    query, rows = normed(asking, layer.attention_norm), normed(known, layer.attention_norm)
    size = layer.head_size
    queries = (layer.query.weight @ query).split(size)
    groups = len(queries) // (layer.key.weight.shape[0] // size)
    out = []
    for head, q in enumerate(queries):
        mine = slice(head // groups * size, (head // groups + 1) * size)
        keys = [turned(layer.key.weight[mine] @ row, p) for row, p in zip(rows, positions, strict=True)]
        values = torch.stack([layer.value.weight[mine] @ row for row in rows])
        scores = torch.stack([turned(q, at) @ key for key in keys]) / math.sqrt(size)
        out.append(scores.softmax(0) @ values)
    return layer.output.weight @ torch.cat(out)


def feed_forward(layer: PlainLayer, row: Tensor) -> Tensor:
    inner = layer.up.weight @ normed(row, layer.mlp_norm)
    if layer.gate is None:
        cubic = math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)
        return layer.down.weight @ (0.5 * inner * (1 + torch.tanh(cubic)))
    gate = layer.gate.weight @ normed(row, layer.mlp_norm)
    return layer.down.weight @ (gate * gate.sigmoid() * inner)


def update(
    layer: PlainLayer, rows: Tensor, i: int, known: Tensor, at: int, positions: Sequence[int]
) -> Tensor:
    attended = attention(layer, rows[i], known, at, positions)
    return attended + feed_forward(layer, rows[i] + attended)


def prepared(peer: nn.Module) -> tuple[Any, Tensor]:
    """Float64, large random weights, and an input that asks for its gradient."""
    generator = torch.Generator().manual_seed(0)
    peer.double()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1))
    inputs = torch.randn(BATCH, LENGTH, 24, generator=generator, dtype=torch.float64)
    return peer, inputs.requires_grad_()


def check(peer: nn.Module, inputs: Tensor, expected: Tensor) -> None:
    """Output and the gradients of the input and of every parameter."""
    upstream = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [inputs, *peer.parameters()]
    out = peer(inputs)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # tables of rotary positions are fp32
    results = [torch.autograd.grad(x, wanted, upstream, allow_unused=True) for x in (out, expected)]
    assert any(gradient is not None for gradient in results[1])
    for found, reference in zip(*results, strict=True):
        assert (found is None) == (reference is None)
        if found is not None:
            torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)


def best(scores: Tensor, count: int) -> list[int]:
    return sorted(scores.argsort(descending=True)[:count].tolist())


def assembled(inputs: Tensor, updates: dict[tuple[int, int], Tensor]) -> Tensor:
    rows = [
        [x + updates[b, i] if (b, i) in updates else x for i, x in enumerate(sequence)]
        for b, sequence in enumerate(inputs)
    ]
    return torch.stack([torch.stack(sequence) for sequence in rows])


def test_a_plain_layer_is_causal_attention_and_a_feed_forward_network(model: ModelConfig) -> None:
    layer, inputs = prepared(PlainLayer(model, LENGTH))
    updates = {
        (b, i): update(layer, x, i, x[: i + 1], i, range(i + 1))
        for b, x in enumerate(inputs)
        for i in range(LENGTH)
    }
    check(layer, inputs, assembled(inputs, updates))


def test_mixture_of_depths_runs_the_best_of_each_sequence_among_themselves(model: ModelConfig) -> None:
    peer, inputs = prepared(MixtureOfDepths(model, LENGTH, DENSITY))
    updates = {}
    for b, x in enumerate(inputs):
        scores = x @ peer.score.weight[0]
        chosen = best(scores, KEPT)
        for slot, i in enumerate(chosen):
            seen = chosen[: slot + 1]
            updates[b, i] = update(peer.layer, x, i, x[seen], i, seen) * scores[i].sigmoid()
    check(peer, inputs, assembled(inputs, updates))


def test_the_packed_layer_sees_keys_of_all_tokens(model: ModelConfig) -> None:
    peer, inputs = prepared(Packed(model, LENGTH, DENSITY))
    updates = {}
    for b, x in enumerate(inputs):
        scores = normed(x, peer.layer.attention_norm) @ peer.score.weight[0]
        for i in best(scores, KEPT):
            full = update(peer.layer, x, i, x[: i + 1], i, range(i + 1))
            updates[b, i] = full * scores[i].sigmoid()
    check(peer, inputs, assembled(inputs, updates))


def test_masked_compute_adds_the_updates_of_positive_scores(model: ModelConfig) -> None:
    peer, inputs = prepared(Masked(model, LENGTH))
    updates = {}
    for b, x in enumerate(inputs):
        for i in range(LENGTH):
            p = (x[i] @ peer.score.weight[0]).sigmoid()
            hard = (p > 0.5).double() + p - p.detach()
            updates[b, i] = update(peer.layer, x, i, x[: i + 1], i, range(i + 1)) * hard
    check(peer, inputs, assembled(inputs, updates))


def test_one_expert_runs_the_best_of_the_micro_batch(grid: ParallelGrid, model: ModelConfig) -> None:
    count = math.ceil(DENSITY * BATCH * LENGTH)
    peer, inputs = prepared(OneExpert(model, LENGTH, DENSITY))
    layer, (first, second) = (
        peer.layer,
        [
            getattr(peer.experts.experts.local_experts[0], name).weight
            for name in ("linear_fc1", "linear_fc2")
        ],
    )
    if model.activation == "swiglu":
        gate, up = first.chunk(2)
        layer.gate, layer.up = SimpleNamespace(weight=gate), SimpleNamespace(weight=up)
    else:
        layer.gate, layer.up = None, SimpleNamespace(weight=first)
    layer.down = SimpleNamespace(weight=second)
    middle = torch.stack(
        [
            torch.stack([x[i] + attention(layer, x[i], x[: i + 1], i, range(i + 1)) for i in range(LENGTH)])
            for x in inputs
        ]
    )
    rows = middle.flatten(0, 1)
    scores = normed(rows, layer.mlp_norm) @ peer.experts.router.weight[0]
    updates = {
        divmod(i, LENGTH): feed_forward(layer, rows[i]) * scores[i].sigmoid() for i in best(scores, count)
    }
    assert len(updates) == count
    check(peer, inputs, assembled(middle, updates))


def test_random_ltd_replaces_random_rows_by_the_layer_among_them(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's kernels need a GPU; plain indexing, which they are, stands in for them."""

    def sort_tokens(indices: Tensor, length: int) -> Tensor:
        return indices.sort(dim=-1).values

    def gather(full: Tensor, indices: Tensor, batch_first: bool) -> Tensor:
        assert batch_first
        return torch.stack([x[i.long()] for x, i in zip(full, indices, strict=True)])

    def scatter(full: Tensor, rows: Tensor, indices: Tensor, batch_first: bool) -> Tensor:
        assert batch_first
        for x, new, i in zip(full, rows, indices, strict=True):
            x[i.long()] = new
        return full

    kernels = SimpleNamespace(token_sort_=sort_tokens, token_gather=gather, token_scatter_=scatter)
    monkeypatch.setattr(dropping_utils, "random_ltd_module", kernels)
    peer, inputs = prepared(RandomTokens(model, LENGTH, DENSITY, BATCH))
    torch.manual_seed(3)
    out = peer(inputs)
    changed = [(out[b] != inputs[b]).any(dim=1).nonzero().flatten().tolist() for b in range(BATCH)]
    assert [len(rows) for rows in changed] == [KEPT] * BATCH
    updates = {}
    for b, (x, chosen) in enumerate(zip(inputs, changed, strict=True)):
        for slot, i in enumerate(chosen):
            among = x[chosen]
            updates[b, i] = update(peer.layer, among, slot, among[: slot + 1], slot, range(slot + 1))
    torch.testing.assert_close(out, assembled(inputs, updates), rtol=1e-6, atol=1e-6)
