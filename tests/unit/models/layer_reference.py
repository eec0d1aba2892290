"""A decoder layer with skipping, token by token in float64, written from the papers alone.

SkipLayer (arXiv 2311.15436): a token runs the whole layer or none of it; keys and values are made for all.
Nothing of skipmega is used but plain weights by name; autograd gives the gradients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What the weights do not say."""

    heads: int
    kv_heads: int
    head_size: int
    activation: str
    epsilon: float = 1e-5
    theta: float = 10_000.0
    temperature: float = 1.0


@dataclass(frozen=True)
class Result:
    """``out`` [s, b, h]; ``executed`` [s][b]; ``density`` the share chosen, with the router's gradient."""

    out: Tensor
    executed: list[list[bool]]
    density: Tensor


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.pow(2).sum() / len(x) + epsilon).sqrt() * weight


def turn(head: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding: the pair (i, i + d/2) is a complex number, turned by position * theta^(-2i/d)."""
    half = len(head) // 2
    angles = torch.tensor(
        [position * theta ** (-2 * i / len(head)) for i in range(half)], dtype=torch.float64
    )
    turned = torch.complex(head[:half], head[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag])


def feed_forward(x: Tensor, w: Weights, activation: str) -> Tensor:
    up = w["mlp.up.weight"] @ x
    if activation == "swiglu":
        gate = w["mlp.gate.weight"] @ x
        return w["mlp.down.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
    gelu = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return w["mlp.down.weight"] @ gelu


def run_layer(
    hidden: Tensor,
    w: Weights,
    shape: Shape,
    documents: Tensor | None,
    noise: Tensor | None,
    group_size: int,
    capacity: int | None,
) -> Result:
    """``hidden`` [s, b, h] float64; ``noise`` [s, b], added to the margin of executing over skipping."""
    length, batch, _ = hidden.shape
    rows, executed, chosen = [], [[False] * batch for _ in range(length)], []
    for b in range(batch):
        normed = [norm(hidden[i, b], w["attention_norm.weight"], shape.epsilon) for i in range(length)]
        keys, values = _keys_and_values(normed, w, shape)
        slots_taken = 0
        for i in range(length):
            if i % group_size == 0:
                slots_taken = 0
            logits = w["router.weight"] @ normed[i]
            margin = logits[1] - logits[0]
            if noise is not None:
                margin = (margin + noise[i, b].double()) / shape.temperature
            probability = 1 / (1 + torch.exp(-margin))
            choose = bool(margin > 0)
            chosen.append(float(choose) + probability - probability.detach())
            if not choose or (capacity is not None and slots_taken >= capacity):
                rows.append(hidden[i, b])
                continue
            slots_taken += 1
            executed[i][b] = True
            seen = [j for j in range(i + 1) if documents is None or documents[b, j] == documents[b, i]]
            attended = _attend(normed[i], i, [keys[j] for j in seen], [values[j] for j in seen], w, shape)
            middle = norm(hidden[i, b] + attended, w["mlp_norm.weight"], shape.epsilon)
            update = attended + feed_forward(middle, w, shape.activation)
            rows.append(hidden[i, b] + update * (1 + probability - probability.detach()))
    out = torch.stack(rows).view(batch, length, -1).transpose(0, 1)
    return Result(out, executed, torch.stack(chosen).mean())


def _keys_and_values(normed: Sequence[Tensor], w: Weights, shape: Shape) -> tuple[list[Tensor], list[Tensor]]:
    """Of all tokens, each [kv_heads, d]."""
    keys, values = [], []
    for position, x in enumerate(normed):
        heads = (w["attention.key.weight"] @ x).view(shape.kv_heads, shape.head_size)
        keys.append(torch.stack([turn(head, position, shape.theta) for head in heads]))
        values.append((w["attention.value.weight"] @ x).view(shape.kv_heads, shape.head_size))
    return keys, values


def _attend(
    x: Tensor, position: int, keys: list[Tensor], values: list[Tensor], w: Weights, shape: Shape
) -> Tensor:
    queries = (w["attention.query.weight"] @ x).view(shape.heads, shape.head_size)
    outputs = []
    for h in range(shape.heads):
        query = turn(queries[h], position, shape.theta)
        kv = h * shape.kv_heads // shape.heads
        scores = torch.stack([query @ key[kv] / math.sqrt(shape.head_size) for key in keys])
        weights = torch.exp(scores - scores.max().detach())
        outputs.append(sum(p * value[kv] for p, value in zip(weights / weights.sum(), values, strict=True)))
    return w["attention.output.weight"] @ torch.cat(outputs)
