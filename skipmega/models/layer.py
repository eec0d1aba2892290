"""One decoder layer, dense or routed.

A routed layer is a mixture of one expert, the layer itself (or one of its halves), and a free one, identity:
route, plan, dispatch (pack the executed tokens), run, combine (write back). Keys and values are made for all
tokens, so a skipped token stays visible as context, unless ``routing.keys_values`` says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from skipmega.config import RunConfig
from skipmega.kernels.attention import AttentionBackend
from skipmega.kernels.rows import add_rows, gather_rows
from skipmega.models.attention import Attention
from skipmega.models.mlp import MLP
from skipmega.models.norm import RMSNorm
from skipmega.models.recompute import run_again
from skipmega.models.rotary import RotaryTable
from skipmega.parallel.sequence import SequenceShards
from skipmega.routing.dispatch import gather_counts, plan_balance, run_balanced
from skipmega.routing.plan import PackingPlan, group_capacity, make_plan, slots_before
from skipmega.routing.router import Decision, Router, RouterInputs


@dataclass(frozen=True)
class LayerContext:
    """What all layers share in one micro-batch.

    ``since`` [b, s] int64, first position each token of the whole sequences may see, or None for 0;
    ``capacity_factor`` None is dropless; ``attention`` is the implementation to use; ``rotary`` the table of
    all positions, made anew by every layer if None; ``positions`` [n, 1 or b] int64 those of the rows that
    attention gathers, None for 0, 1, ...; ``warmed`` how far the density has come from 1 (0.0) to its target
    (1.0).
    """

    since: Tensor | None
    capacity_factor: float | None
    attention: AttentionBackend = "sdpa"
    rotary: RotaryTable | None = None
    positions: Tensor | None = None
    warmed: float = 1.0


class RoutingRecord(NamedTuple):
    """What a routed layer did with this rank's s rows of a micro-batch of b sequences."""

    chosen: Tensor  # [s, b] float32, 1 where the router chose to execute, with the router's gradient
    executed: Tensor  # [s, b] bool, tokens that ran (chosen and not over capacity)
    score: Tensor  # [s, b] float32, what evaluation compares with the threshold; no gradient
    auxiliary: Tensor  # [] float32, the router's own losses, weighted
    entropy: Tensor  # [] float32, mean entropy of the decisions in nats; no gradient
    slots: int  # rows that were computed, padding included
    moved: int  # rows that another rank computed


LayerResult = tuple[Tensor, RoutingRecord | None]


class Plans(NamedTuple):
    """Which rows execute: of this rank's, and of those that attention gathers (the same ones, unless
    sequences are cut over the tensor axis)."""

    mine: PackingPlan
    gathered: PackingPlan


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward network, with a router if it has a ``density``.

    A layer doesn't know its number: all of one kind are one compiled program.

    Args:
        config: the run's configuration.
        density: target share of tokens that execute; None for a dense layer.
        eval_density: the same in evaluation; None as in training.
        shards: how sequences and matrices are cut.
    """

    def __init__(
        self,
        config: RunConfig,
        density: float | None,
        eval_density: float | None,
        shards: SequenceShards,
    ) -> None:
        super().__init__()
        model = config.model
        self.attention_norm = RMSNorm(model.hidden_size, model.norm_epsilon)
        cheap = config.training.recompute == "cheap"
        self.attention = Attention(model, shards, packs_again=cheap)
        self.mlp_norm = RMSNorm(model.hidden_size, model.norm_epsilon)
        self.mlp = MLP(model, shards, activates_again=cheap)
        self.shards = shards
        self.router = None if density is None else Router(config.routing, model.hidden_size)
        self.density = 1.0 if density is None else density
        self.eval_density = self.density if eval_density is None else eval_density
        self.routing = config.routing
        self.recompute = config.training.recompute

    def forward(self, hidden: Tensor, inputs: RouterInputs | None, context: LayerContext) -> LayerResult:
        """Run the layer.

        Args:
            hidden: [s, b, hidden], this rank's rows.
            inputs: of a routed layer's router.
            context: what all layers share.

        Returns:
            [s, b, hidden], and the record of a routed layer.
        """
        if context.rotary is None:
            length = hidden.shape[0] * self.shards.both.size
            table = self.attention.rotary_table(length, hidden.device)
            context = replace(context, rotary=table)
        normed = self._part("cheap", self.attention_norm, hidden)
        if self.router is None:
            middle = hidden + self._attend(normed, context)
            return middle + self._feed_forward(middle), None
        assert inputs is not None
        if self.routing.wrap == "mlp":
            hidden = hidden + self._attend(normed, context)
            normed = self._part("cheap", self.mlp_norm, hidden)
        density = 1 - (1 - self.density) * context.warmed if self.training else self.eval_density
        tokens = hidden if self.routing.router_input == "raw" else normed
        decision = self.router(tokens, inputs, density, self.shards)
        plans = self._plan(decision.execute, density, context)
        moved = 0
        if self.routing.computes_all:
            out = self._mask(hidden, normed, decision, plans.mine, context)
        else:
            out, moved = self._pack(hidden, normed, decision, plans, context)
        if self.routing.wrap == "attention":
            out = out + self._feed_forward(out)
        rows = decision.execute.numel() if self.routing.computes_all else plans.mine.rows.numel()
        record = RoutingRecord(
            chosen=decision.straight_through(),
            executed=plans.mine.kept,
            score=decision.score,
            auxiliary=decision.auxiliary,
            entropy=decision.entropy(),
            slots=rows,
            moved=moved,
        )
        return out, record

    def _plan(self, execute: Tensor, density: float, context: LayerContext) -> Plans:
        """Slots are dealt among this rank's rows, as many on every rank of the tensor axis."""
        rows = execute.shape[0]
        group_size = self.routing.group_size or rows
        factor = context.capacity_factor
        if self.training and self.routing.router == "topk":
            factor = 1.0  # exactly those who were chosen
        capacity = None
        if self.routing.router == "highway":  # everybody, whatever the groups
            group_size = capacity = rows
        elif factor is None:
            group_size = rows
        else:
            capacity = group_capacity(factor, density, group_size, self.routing.min_capacity)
        gathered = make_plan(self.shards.over_tensor_ranks(execute), group_size, capacity)
        if not self.shards.over_tensor:
            return Plans(gathered, gathered)
        return Plans(gathered.part(self.shards.tensor.rank, self.shards.tensor.size), gathered)

    def _pack(
        self, hidden: Tensor, normed: Tensor, decision: Decision, plans: Plans, context: LayerContext
    ) -> tuple[Tensor, int]:
        """Run the executed tokens alone, in packed form; also the number of rows that another rank ran."""
        plan = plans.mine

        def pack(full: Tensor) -> Tensor:
            packed = self._part("cheap", gather_rows, full.flatten(0, 1), plan.rows, plan.slots)
            return packed.view(-1, full.shape[1], full.shape[-1])

        if self.routing.wrap == "mlp":
            update, moved = self._dispatched(
                lambda rows: self._part("mlp", self.mlp, rows), pack(normed), plan
            )
        else:
            if self.routing.keys_values == "all":
                attended = self._attend(normed, context, plans.gathered)
            else:
                attended = self._attend_among(pack(normed), plan, context)
            update, moved = attended, 0
            if self.routing.wrap == "layer":
                middle = pack(hidden) + attended
                fed, moved = self._dispatched(self._feed_forward, middle, plan)
                update = attended + fed
        probability = pack(decision.probability.unsqueeze(-1))
        weight = self.weight_of_executed(probability)
        update = update * weight.to(update.dtype)
        out = add_rows(hidden.flatten(0, 1), update.flatten(0, 1), plan.rows, plan.slots)
        return out.view_as(hidden), moved

    def _dispatched(
        self, part: Callable[[Tensor], Tensor], packed: Tensor, plan: PackingPlan
    ) -> tuple[Tensor, int]:
        """Run a ``part`` that works row by row, here or wherever there is room; also the rows sent away."""
        if self.routing.dispatch == "local":
            return part(packed), 0
        rows, real = packed.flatten(0, 1), plan.filled.nonzero().squeeze(1)
        axis = self.shards.tokens
        balance = plan_balance(gather_counts(len(real), axis, rows.device))
        results = run_balanced(rows.index_select(0, real), part, axis, balance, pad=self.shards.over_tensor)
        full = torch.zeros_like(rows).index_copy(0, real, results.to(rows.dtype))
        return full.view_as(packed), sum(balance.sent(axis.rank))

    def _attend(self, normed: Tensor, context: LayerContext, asking: PackingPlan | None = None) -> Tensor:
        """Keys and values of all tokens; those ``asking`` are packed in the result."""
        asked = (normed, context.rotary, context.positions, asking, context.since, context.attention)
        return self._part("attention", self.attention, *asked)

    def _attend_among(self, packed: Tensor, plan: PackingPlan, context: LayerContext) -> Tensor:
        """Keys, values and queries of the executed tokens, which are packed already."""
        since = context.since
        if since is not None:
            # slots are a sequence's executed tokens in order: its documents begin where they do among those
            first = slots_before(plan.kept).gather(0, since.t())
            since = first.gather(0, plan.positions).t()
        among = (packed, context.rotary, plan.positions, None, since, context.attention)
        return self._part("attention", self.attention, *among)

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        """Normalise and run the feed-forward network: [..., hidden] to [..., hidden]."""
        return self._part("mlp", lambda rows: self.mlp(self._part("cheap", self.mlp_norm, rows)), hidden)

    def _part(self, name: str, part: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Run a part of the layer, again in backward if ``training.recompute`` names it."""
        return run_again(part, *arguments, when=self.recompute == name and self.training)

    def _mask(
        self, hidden: Tensor, normed: Tensor, decision: Decision, plan: PackingPlan, context: LayerContext
    ) -> Tensor:
        """Run every token and mask: nothing is saved, but skipped tokens too teach the router."""
        if self.routing.wrap == "mlp":
            update = self._part("mlp", self.mlp, normed)
        else:
            update = self._attend(normed, context)
            if self.routing.wrap == "layer":
                update = update + self._feed_forward(hidden + update)
        probability = decision.probability
        weight = self._weight(probability, plan.kept.float())
        return hidden + update * weight.unsqueeze(-1).to(update.dtype)

    def weight_of_executed(self, probability: Tensor) -> Tensor:
        """What the updates of tokens that execute with this probability are multiplied by, of its shape."""
        return self._weight(probability, torch.ones_like(probability))

    def _weight(self, probability: Tensor, kept: Tensor) -> Tensor:
        """What updates are multiplied by: 0 where not ``kept`` (0 or 1), else 1 or the probability.

        Its gradient with respect to the probability is the same for all tokens, kept or not.
        """
        kind = self.routing.weight_of_updates
        value = kept if kind == "straight_through" else kept * probability.detach()
        weight = value + (probability - probability.detach())
        return 2 * weight if kind == "twice_score" else weight
