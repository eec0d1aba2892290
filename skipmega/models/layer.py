"""One decoder layer, dense or routed.

A routed layer is a mixture of one expert, the layer itself, and a free one, identity: route, plan,
dispatch (pack the executed tokens), run, combine (write back). Keys and values are made for all tokens,
so a skipped token stays visible as context.
"""

from dataclasses import dataclass
from typing import NamedTuple

from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from skipmega.config import RunConfig
from skipmega.kernels.attention import AttentionBackend
from skipmega.kernels.rows import add_rows, gather_rows
from skipmega.models.attention import Attention
from skipmega.models.mlp import MLP
from skipmega.models.norm import RMSNorm
from skipmega.parallel.grid import Axis
from skipmega.routing.plan import group_capacity, make_plan
from skipmega.routing.router import Decision, GumbelRouter


@dataclass(frozen=True)
class LayerContext:
    """What all layers share in one micro-batch.

    ``since`` [b, s] int64, first position each token may see, or None for 0; ``capacity_factor`` None is
    dropless; ``attention`` is the implementation to use.
    """

    since: Tensor | None
    capacity_factor: float | None
    attention: AttentionBackend = "sdpa"


class RoutingRecord(NamedTuple):
    """What a routed layer did with a micro-batch."""

    chosen: Tensor  # [s, b] float32, 1 where the router chose to execute, with the router's gradient
    executed: Tensor  # [s, b] bool, tokens that ran (chosen and not over capacity)


LayerResult = tuple[Tensor, RoutingRecord | None]


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward network, with a router in front if ``routed``.

    A layer doesn't know its number: all of one kind are one compiled program.
    """

    def __init__(self, config: RunConfig, routed: bool, megatron: TransformerConfig, axis: Axis) -> None:
        super().__init__()
        model, routing = config.model, config.routing
        self.attention_norm = RMSNorm(model.hidden_size, model.norm_epsilon)
        self.attention = Attention(model, megatron, axis)
        self.mlp_norm = RMSNorm(model.hidden_size, model.norm_epsilon)
        self.mlp = MLP(model, megatron, axis)
        self.router = GumbelRouter(model.hidden_size, routing.temperature) if routed else None
        self.density = routing.density
        self.group_size = routing.group_size

    def forward(self, hidden: Tensor, noise: Tensor | None, context: LayerContext) -> LayerResult:
        """Run the layer.

        Args:
            hidden: [s, b, hidden].
            noise: [s, b] float32 makes the router sample (training); None decides greedily.
            context: what all layers share.

        Returns:
            [s, b, hidden], and the record of a routed layer.
        """
        normed = self.attention_norm(hidden)
        if self.router is None:
            middle = hidden + self.attention(normed, normed, None, context.since, context.attention)
            return middle + self.mlp(self.mlp_norm(middle)), None
        decision = self.router(normed, noise)
        return self._run_executed(hidden, normed, decision, context)

    def _run_executed(
        self, hidden: Tensor, normed: Tensor, decision: Decision, context: LayerContext
    ) -> tuple[Tensor, RoutingRecord]:
        length, batch, width = hidden.shape
        group_size = self.group_size or length
        factor = context.capacity_factor
        capacity = None if factor is None else group_capacity(factor, self.density, group_size)
        plan = make_plan(decision.execute, group_size, capacity)

        def pack(full: Tensor) -> Tensor:
            return gather_rows(full.flatten(0, 1), plan.rows, plan.slots).view(-1, batch, full.shape[-1])

        attended = self.attention(normed, pack(normed), plan.positions, context.since, context.attention)
        update = attended + self.mlp(self.mlp_norm(pack(hidden) + attended))
        probability = pack(decision.probability.unsqueeze(-1))
        update = update * (1 + probability - probability.detach()).to(update.dtype)
        out = add_rows(hidden.flatten(0, 1), update.flatten(0, 1), plan.rows, plan.slots)
        record = RoutingRecord(chosen=decision.straight_through(), executed=plan.kept)
        return out.view(length, batch, width), record
