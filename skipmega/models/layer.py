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
from skipmega.routing.router import Decision, GumbelRouter, NoiseKey


@dataclass(frozen=True)
class LayerContext:
    """What all layers share in one micro-batch.

    ``documents`` [b, s] int64 or None; ``noise`` makes the routers sample (training), None decides
    greedily; ``capacity_factor`` None is dropless; ``attention`` is the implementation to use.
    """

    documents: Tensor | None
    noise: NoiseKey | None
    capacity_factor: float | None
    attention: AttentionBackend = "sdpa"


class RoutingRecord(NamedTuple):
    """What a routed layer did with a micro-batch."""

    density: Tensor  # [] float32, share of tokens the router chose, with the router's gradient
    executed: Tensor  # [s, b] bool, tokens that ran (chosen and not over capacity)


LayerResult = tuple[Tensor, RoutingRecord | None]


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward network, with a router in front if ``router`` is given."""

    def __init__(self, config: RunConfig, layer: int, megatron: TransformerConfig, axis: Axis) -> None:
        super().__init__()
        model, routing = config.model, config.routing
        self.attention_norm = RMSNorm(model.hidden_size, model.norm_epsilon)
        self.attention = Attention(model, megatron, axis)
        self.mlp_norm = RMSNorm(model.hidden_size, model.norm_epsilon)
        self.mlp = MLP(model, megatron, axis)
        self.router = (
            GumbelRouter(model.hidden_size, layer, routing.temperature)
            if config.layer_is_routed(layer)
            else None
        )
        self.density = routing.density
        self.group_size = routing.group_size

    def forward(self, hidden: Tensor, context: LayerContext) -> LayerResult:
        """[s, b, hidden] to the same; also the record of a routed layer."""
        normed = self.attention_norm(hidden)
        if self.router is None:
            middle = hidden + self.attention(normed, normed, None, context.documents, context.attention)
            return middle + self.mlp(self.mlp_norm(middle)), None
        decision = self.router(normed, context.noise)
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

        attended = self.attention(
            normed, pack(normed), plan.positions, context.documents, context.attention
        )
        update = attended + self.mlp(self.mlp_norm(pack(hidden) + attended))
        probability = pack(decision.probability.unsqueeze(-1))
        update = update * (1 + probability - probability.detach()).to(update.dtype)
        out = add_rows(hidden.flatten(0, 1), update.flatten(0, 1), plan.rows, plan.slots)
        record = RoutingRecord(density=decision.straight_through().mean(), executed=plan.kept)
        return out.view(length, batch, width), record
