"""A decoder layer with routing, token by token in float64, written from the description of RoutingConfig.

Nothing of skipmega is used but plain weights by name; autograd gives the gradients. Tokens are named by
``(position, sequence)``.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Token = tuple[int, int]
Tokens = dict[Token, Tensor]


@dataclass(frozen=True)
class Shape:
    """What the weights do not say."""

    heads: int
    kv_heads: int
    head_size: int
    activation: str
    epsilon: float = 1e-5
    theta: float = 10_000.0


@dataclass(frozen=True)
class Rule:
    """The fields of RoutingConfig, defaults filled in; ``capacity`` slots of each group, None is dropless;
    ``dense``: skipped tokens too teach the router; ``centred``: the threshold follows the scores, so the mean
    of their gradient is taken out."""

    router: str
    update_weight: str
    density: float
    group_size: int
    capacity: int | None
    training: bool
    threshold: float
    temperature: float
    wrap: str = "layer"
    keys_values: str = "all"
    router_input: str = "normed"
    dense: bool = False
    centred: bool = False
    quantile_from: str = "batch"
    stand_in: str = "score"
    stand_in_weight: float = 0.0
    z_loss_weight: float = 0.0


@dataclass(frozen=True)
class Result:
    """``out`` [s, b, h]; ``executed`` [s, b] bool; ``density`` the share chosen, with the router's gradient;
    ``auxiliary`` the router's own losses, weighted."""

    out: Tensor
    executed: Tensor
    density: Tensor
    auxiliary: Tensor


@dataclass(frozen=True)
class Choice:
    chosen: set[Token]
    probability: Tokens
    auxiliary: Tensor


def run_layer(
    hidden: Tensor, w: Weights, shape: Shape, rule: Rule, documents: Tensor | None, noise: Tensor | None
) -> Result:
    """``hidden`` [s, b, h] float64; ``documents`` [b, s]; ``noise`` [s, b], added to the score."""
    length, batch, _ = hidden.shape
    names = [(i, b) for b in range(batch) for i in range(length)]
    x = {at: hidden[at] for at in names}
    normed = {at: norm(x[at], w["attention_norm.weight"], shape.epsilon) for at in names}
    attend = _Attention(normed, w, shape, documents)
    if rule.wrap == "mlp":
        x = {at: x[at] + attend(at, names) for at in names}
        normed = {at: norm(x[at], w["mlp_norm.weight"], shape.epsilon) for at in names}
    choice = choose(x if rule.router_input == "raw" else normed, w, rule, noise)
    kept = within_capacity(choice.chosen, length, batch, rule)
    context = names if rule.keys_values == "all" else kept
    out = {}
    for at in names:
        out[at] = x[at]
        if at in kept or rule.dense:
            if rule.wrap == "mlp":
                update = feed_forward(normed[at], w, shape.activation)
            else:
                update = attend(at, context)
            if rule.wrap == "layer":
                middle = norm(x[at] + update, w["mlp_norm.weight"], shape.epsilon)
                update = update + feed_forward(middle, w, shape.activation)
            out[at] = x[at] + update * update_weight(choice.probability[at], at in kept, rule)
        if rule.wrap == "attention":
            middle = norm(out[at], w["mlp_norm.weight"], shape.epsilon)
            out[at] = out[at] + feed_forward(middle, w, shape.activation)
    shares = [float(at in choice.chosen) + gradient_only(choice.probability[at]) for at in names]
    return Result(
        out=torch.stack([out[at] for at in names]).view(batch, length, -1).transpose(0, 1),
        executed=torch.tensor([[(i, b) in kept for b in range(batch)] for i in range(length)]),
        density=torch.stack(shares).mean(),
        auxiliary=choice.auxiliary,
    )


def choose(read: Tokens, w: Weights, rule: Rule, noise: Tensor | None) -> Choice:
    logits = {at: router_logits(token, w, rule) for at, token in read.items()}
    score = {at: both[1] - both[0] for at, both in logits.items()}
    if rule.centred:
        mean = torch.stack(list(score.values())).mean()
        score = {at: of_token - gradient_only(mean) for at, of_token in score.items()}
    stand_in = {at: predict(read[at], w) if rule.stand_in == "predictor" else score[at] for at in read}
    if rule.router in ("gumbel", "sigmoid", "random", "fixed_input"):
        drawn = {at: 0.0 if noise is None else float(noise[at]) for at in read}
        margin = {at: (score[at] - rule.threshold + drawn[at]) / rule.temperature for at in read}
        chosen = {at for at in read if margin[at] > 0}
        probability = {at: logistic(margin[at]) for at in read}
    else:
        chosen = rank(score, stand_in, rule)
        probability = {at: logistic(score[at]) for at in read}
    auxiliary = torch.zeros((), dtype=torch.float64)
    if rule.training and "router.weight" in w:
        sizes = [torch.log(torch.exp(both[0]) + torch.exp(both[1])) ** 2 for both in logits.values()]
        auxiliary = auxiliary + rule.z_loss_weight * torch.stack(sizes).mean()
    if rule.training and rule.router == "topk":
        said = {at: logistic(stand_in[at]) for at in read}
        errors = [-torch.log(said[at] if at in chosen else 1 - said[at]) for at in read]
        auxiliary = auxiliary + rule.stand_in_weight * torch.stack(errors).mean()
    return Choice(chosen, probability, auxiliary)


def rank(score: Tokens, stand_in: Tokens, rule: Rule) -> set[Token]:
    """Whom the routers choose that do not decide for each token by a coin or a half."""
    if rule.router == "never":
        return set()
    if rule.router == "highway":
        return set(score)
    if rule.training and rule.router == "topk":
        groups: dict[tuple[int, int], list[Token]] = {}
        for position, sequence in score:
            groups.setdefault((position // rule.group_size, sequence), []).append((position, sequence))
        return {at for group in groups.values() for at in best(group, score, rule.density)}
    if rule.training and rule.router == "quantile" and rule.quantile_from == "batch":
        return set(best(list(score), score, rule.density))
    return {at for at in score if stand_in[at] > rule.threshold}


def best(of: list[Token], score: Tokens, share: float) -> list[Token]:
    count = math.ceil(round(share * len(of), 6))
    return sorted(of, key=lambda at: -score[at].item())[:count]


def within_capacity(chosen: set[Token], length: int, batch: int, rule: Rule) -> set[Token]:
    """The first ``capacity`` chosen tokens of each group."""
    kept = set()
    for b in range(batch):
        taken = 0
        for i in range(length):
            if i % rule.group_size == 0:
                taken = 0
            if (i, b) in chosen and (rule.capacity is None or taken < rule.capacity):
                kept.add((i, b))
                taken += 1
    return kept


def update_weight(probability: Tensor, kept: bool, rule: Rule) -> Tensor:
    """0 for a skipped token; its gradient is that of the weight which it would have had."""
    value = {
        "straight_through": torch.ones_like(probability),
        "score": probability.detach(),
        "twice_score": 2 * probability.detach(),
    }[rule.update_weight]
    slope = 2 if rule.update_weight == "twice_score" else 1
    return (value if kept else 0 * value) + slope * gradient_only(probability)


def router_logits(token: Tensor, w: Weights, rule: Rule) -> Tensor:
    """Of skipping and of executing; one logit is the second, against 0."""
    rows = 2 if rule.router == "gumbel" else 1
    logits = w["router.weight"] @ token if "router.weight" in w else token.new_zeros(rows)
    if "router.bias" in w:
        logits = logits + w["router.bias"]
    return logits if rows == 2 else torch.cat([token.new_zeros(1), logits])


def predict(token: Tensor, w: Weights) -> Tensor:
    """The predictor teaches nobody but itself."""
    return (w["router.predictor.down"] @ gelu(w["router.predictor.up"] @ token.detach()))[0]


def gradient_only(x: Tensor) -> Tensor:
    return x - x.detach()


def logistic(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


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
        return w["mlp.down.weight"] @ (gate * logistic(gate) * up)
    return w["mlp.down.weight"] @ gelu(up)


class _Attention:
    """Reads from the tokens of ``context`` that are of the same document and not later."""

    def __init__(self, normed: Tokens, w: Weights, shape: Shape, documents: Tensor | None) -> None:
        self.normed, self.w, self.shape, self.documents = normed, w, shape, documents
        self.keys, self.values = {}, {}
        for at, token in normed.items():
            heads = self._heads("key", token, shape.kv_heads)
            self.keys[at] = [turn(head, at[0], shape.theta) for head in heads]
            self.values[at] = self._heads("value", token, shape.kv_heads)

    def __call__(self, at: Token, context: Collection[Token]) -> Tensor:
        (position, b), shape = at, self.shape
        earlier = [(j, b) for j in range(position + 1) if (j, b) in context]
        seen = [token for token in earlier if self._same_document(token[0], position, b)]
        queries, outputs = self._heads("query", self.normed[at], shape.heads), []
        for h in range(shape.heads):
            query, kv = turn(queries[h], position, shape.theta), h * shape.kv_heads // shape.heads
            keys = torch.stack([self.keys[token][kv] for token in seen])
            scores = keys @ query / math.sqrt(shape.head_size)
            shares = torch.exp(scores - scores.max().detach())
            outputs.append(shares / shares.sum() @ torch.stack([self.values[token][kv] for token in seen]))
        return self.w["attention.output.weight"] @ torch.cat(outputs)

    def _same_document(self, i: int, j: int, b: int) -> bool:
        return self.documents is None or bool(self.documents[b, i] == self.documents[b, j])

    def _heads(self, name: str, x: Tensor, count: int) -> Tensor:
        return (self.w[f"attention.{name}.weight"] @ x).view(count, self.shape.head_size)
