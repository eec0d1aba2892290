"""Reading through a decoder's layers: weights and decisions of training, without what learning needs.

Nothing asks for fixed shapes here, so the executed tokens of all texts lie one behind the other, without
slots, and of the others only keys and values are made. In attention all tokens ask, with one mask for all
layers or none, and those that execute get their answers: of short texts asking costs less than packing.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from skipmega.inference.cache import LayerCache
from skipmega.models.attention import Attention
from skipmega.models.layer import DecoderLayer
from skipmega.models.rotary import RotaryTable
from skipmega.routing.plan import group_capacity, make_plan
from skipmega.routing.router import RouterInputs


@dataclass(frozen=True)
class Pass:
    """What all layers share when the next n tokens of each of b texts are read.

    Args:
        positions: [n, b] int64 of the tokens in their texts; None if these are the first.
        cosine: [n, 1 or b, 1, d] float32, of the angles by which heads turn.
        sine: alike, with a minus in the first half of the channels.
        mask: [b, 1, n, slots] of the heads' dtype, 0 where a token sees a key and -inf elsewhere; None if
            each sees all up to itself.
        slots: keys and values that a cache holds after this.
        capacity_factor: None is dropless.
    """

    positions: Tensor | None
    cosine: Tensor
    sine: Tensor
    mask: Tensor | None
    slots: int
    capacity_factor: float | None

    @classmethod
    def of(
        cls,
        table: RotaryTable,
        positions: Tensor | None,
        visible: Tensor | None,
        dtype: torch.dtype,
        slots: int,
        capacity_factor: float | None,
    ) -> "Pass":
        """Of tokens at ``positions``, or of the first ones, as many as ``table`` has angles for.

        Args:
            visible: [b, n, slots] bool, or [b, n, n] of first tokens; None for all up to each.
        """
        cosine, sine = (part.unsqueeze(1) if positions is None else part[positions] for part in table)
        return cls(
            positions,
            torch.cat([cosine, cosine], dim=-1).unsqueeze(2),
            torch.cat([-sine, sine], dim=-1).unsqueeze(2),
            None if visible is None else _mask(visible, dtype).unsqueeze(1),
            slots,
            capacity_factor,
        )

    def turn(self, heads: Tensor) -> Tensor:
        """Turn [n, b, heads, d] to the tokens' positions, as :func:`skipmega.models.rotary.rotate`."""
        wide = heads.float()
        swapped = wide.roll(wide.shape[-1] // 2, dims=-1)
        return torch.addcmul(wide * self.cosine, swapped, self.sine).to(heads.dtype)

    def among(self, executed: Tensor, dtype: torch.dtype) -> Tensor:
        """The mask [b, 1, n, n] of first tokens that see only those ``executed`` [n, b]."""
        length = executed.shape[0]
        seen = executed.t()[:, None, None, :]
        if self.mask is not None:
            return self.mask + _mask(seen, dtype)
        before = torch.ones(length, length, dtype=torch.bool, device=executed.device).tril()
        return _mask(before & seen, dtype)


def read_layer(
    layer: DecoderLayer, hidden: Tensor, inputs: RouterInputs | None, now: Pass, cache: LayerCache | None
) -> tuple[Tensor, Tensor | None]:
    """Run a layer without gradients.

    Args:
        layer: sequences are whole on every process.
        hidden: [n, b, hidden].
        inputs: of a routed layer's router.
        now: what all layers share.
        cache: keys and values of the tokens before these, to which theirs are added; None: these are all.

    Returns:
        [n, b, hidden], and of a routed layer which tokens executed: [n, b] bool.
    """
    routing, attention = layer.routing, layer.attention
    normed = layer.attention_norm(hidden)
    keys = _keys_and_values(attention, normed, now, cache)
    if layer.router is None:
        hidden = hidden + _attend(attention, normed, keys, now, now.mask).view_as(hidden)
        return hidden + layer.mlp(layer.mlp_norm(hidden)), None
    assert inputs is not None
    if routing.wrap == "mlp":
        hidden = hidden + _attend(attention, normed, keys, now, now.mask).view_as(hidden)
        normed = layer.mlp_norm(hidden)
    decision = layer.router(hidden if routing.router_input == "raw" else normed, inputs, layer.eval_density)
    executed = _within_capacity(layer, decision.execute, now.capacity_factor)
    rows = executed.flatten().nonzero().squeeze(1)
    if len(rows) > 0:
        flat = hidden.flatten(0, 1)
        if routing.wrap == "mlp":
            update = layer.mlp(normed.flatten(0, 1)[rows])
        else:
            among = routing.keys_values == "executed"
            mask = now.among(executed, normed.dtype) if among else now.mask
            update = _attend(attention, normed, keys, now, mask, rows)
        if routing.wrap == "layer":
            update = update + layer.mlp(layer.mlp_norm(flat[rows] + update))
        weight = layer.weight_of_executed(decision.probability.flatten()[rows])
        hidden = flat.index_add(0, rows, update * weight.unsqueeze(1).to(update.dtype)).view_as(hidden)
    if routing.wrap == "attention":
        hidden = hidden + layer.mlp(layer.mlp_norm(hidden))
    return hidden, executed


def _keys_and_values(
    attention: Attention, normed: Tensor, now: Pass, cache: LayerCache | None
) -> tuple[Tensor, Tensor]:
    """Of all tokens read so far, [keys, b, kv_heads, d]."""
    key = now.turn(attention.split(attention.key(normed)))
    value = attention.split(attention.value(normed))
    return (key, value) if cache is None else cache.extend(key, value, now.positions, now.slots)


def _attend(
    attention: Attention,
    normed: Tensor,
    keys: tuple[Tensor, Tensor],
    now: Pass,
    mask: Tensor | None,
    rows: Tensor | None = None,
) -> Tensor:
    """What tokens read, [n * b, hidden] or [m, hidden] of those ``rows`` [m] int64."""
    query = now.turn(attention.split(attention.query(normed)))
    read = _softmax_attention(query, *keys, mask).flatten(0, 1).flatten(1)
    return attention.shards.leave(attention.output(read if rows is None else read[rows]))


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """[n, b, heads, d] of [keys, b, kv_heads, d]; not all kernels know grouped heads, so they get none."""
    n, _, heads, _ = query.shape
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    group = heads // k.shape[1]
    if n == 1:  # the heads of a group ask one after the other
        q = q.unflatten(1, (-1, group)).squeeze(3)
    elif group > 1:
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and n > 1)
    return out.flatten(1, 2).unsqueeze(0) if n == 1 else out.permute(2, 0, 1, 3)


def _mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


def _within_capacity(layer: DecoderLayer, execute: Tensor, factor: float | None) -> Tensor:
    """[n, b] bool: those of ``execute`` that have a slot."""
    routing = layer.routing
    if factor is None or routing.router == "highway":
        return execute
    assert routing.group_size is not None
    capacity = group_capacity(factor, layer.eval_density, routing.group_size, routing.min_capacity)
    return make_plan(execute, routing.group_size, capacity).kept
