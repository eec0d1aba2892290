"""What a training step costs at least: the operations of a layer and of a step, their FLOPs and bytes.

An operation takes the longer of its arithmetic and its traffic. Each tensor between matrix products is read
and written once, pointwise neighbours being fused: no implementation of the same cut into matrix products
does with less. The router, statistics of norms and the plan are left out, save their traffic over the hidden
states, which they share with the norm.
"""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from skipmega.config import RunConfig
from skipmega.models.flops import count_parameters, forward_flops_per_token, layer_flops

ELEMENT = 2  # bytes of bf16
GRADIENT_SUM = 10  # bytes per weight and micro-batch: a bf16 gradient read, an fp32 sum read and written
UPDATE = 38  # per weight and step: fp32 sum read twice and cleared, master and moments read and written, bf16
# rows and columns of the tiles that matrix products are cut into, and what the smaller ones cost
TILES = (((128, 256), 1.0), ((256, 128), 1.0), ((128, 128), 1.1))

Kind = Literal["matrix", "attention", "traffic"]


class Device(NamedTuple):
    """What of a device can be reached, per second."""

    name: str
    matrix_flops: float  # of large bf16 matrix products
    attention_flops: float  # of causal attention, forward and backward together
    bandwidth: float  # bytes
    processors: int


# 989 TFLOP/s and 3.35 or 4.8 TB/s at most. What attention reaches is scaled_dot_product_attention's measured
# time: 8 x 2048 tokens, 16 heads of 128, causal, 1.44 ms
H100 = Device("H100", 670e12, 335e12, 2.8e12, 132)
H200 = Device("H200", 670e12, 335e12, 4.0e12, 132)


class Operation(NamedTuple):
    """One operation of a forward or backward pass, or all alike of a step.

    ``product`` is the result's (rows, columns) of a matrix product. ``flops`` are those that run: attention's
    backward, which makes its scores anew, has 2.5 times the forward's.
    """

    name: str
    kind: Kind
    flops: float
    bytes: float
    product: tuple[float, float] | None = None

    def seconds(self, device: Device, tiled: bool = False) -> float:
        """The least time; ``tiled`` counts the processors that idle since tiles do not fill them."""
        rate = device.attention_flops if self.kind == "attention" else device.matrix_flops
        waste = tile_waste(*self.product, device.processors) if tiled and self.product else 1.0
        return max(self.flops / rate * waste, self.bytes / device.bandwidth)


def tile_waste(rows: float, columns: float, processors: int) -> float:
    """Time of a matrix product, cut into tiles, over that of processors that are never idle: 1 or more."""

    def waste(height: int, width: int) -> float:
        waves = math.ceil(math.ceil(rows / height) * math.ceil(columns / width) / processors)
        return waves * processors * height * width / (rows * columns)

    return max(1.0, min(cost * waste(*shape) for shape, cost in TILES))


def layer_operations(config: RunConfig, density: float | None, sequences: int) -> list[Operation]:
    """One layer's forward and backward over ``sequences`` sequences of ``data.sequence_length``.

    Args:
        config: model and sequence length; the whole layer is wrapped, keys and values are of all tokens.
        density: share of tokens that execute; None for a dense layer, without router, gather and combine.
        sequences: in the micro-batch.
    """
    model, length = config.model, config.data.sequence_length
    tokens = sequences * length
    rows = tokens if density is None else density * tokens
    hidden, ffn = model.hidden_size, model.ffn_size
    heads, kv_heads = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    gates = 2 if model.activation == "swiglu" else 1
    scores = 4 * rows * heads * (length + 1) / 2
    all_rows, packed = tokens * hidden, rows * hidden  # elements of hidden states, full and packed
    asked, known = rows * heads, tokens * kv_heads

    products = [
        *_product("keys and values", tokens, hidden, 2 * kv_heads),
        *_product("queries", rows, hidden, heads),
        *_product("attention output", rows, heads, hidden),
        *_product("mlp up", rows, hidden, gates * ffn),
        *_product("mlp down", rows, ffn, hidden),
    ]
    attention = [
        Operation("attention", "attention", scores, ELEMENT * (2 * asked + 2 * known)),
        Operation("attention, backward", "attention", 2.5 * scores, ELEMENT * (4 * asked + 4 * known)),
    ]
    traffic = {
        "first norm": 2 * all_rows,
        "rotary": 2 * asked + 2 * known,
        "second norm": 4 * packed,
        "activation": (gates + 1) * rows * ffn,
        "activation, backward": (2 * gates + 2) * rows * ffn,
        "second norm, backward": 4 * packed,
        "rotary, backward": 2 * asked + 2 * known,
        "first norm, backward": 4 * all_rows,
    }
    if density is None:
        traffic["residual"] = 3 * all_rows
    else:
        traffic["gather"] = 2 * packed
        traffic["combine"] = 2 * packed + 2 * all_rows
        traffic["combine, backward"] = 3 * packed  # the gradient gathered, and times the update
        traffic["gather, backward"] = packed  # within the first norm's
    return [*products, *attention, *(_traffic(name, count) for name, count in traffic.items())]


def kept_bytes(config: RunConfig, density: float | None, sequences: int, norms_again: bool) -> float:
    """What one layer keeps for its backward; ``norms_again`` makes the normalised rows anew there.

    All tokens keep the layer's input, its normalised form, key and value; those that execute query,
    attention's output, the middle of the layer, its normalised form, and the feed-forward network's inner
    rows, before and after the activation.
    """
    model = config.model
    tokens = sequences * config.data.sequence_length
    rows = tokens if density is None else density * tokens
    heads, kv_heads = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    inner = (3 if model.activation == "swiglu" else 2) * model.ffn_size
    normed = 0 if norms_again else model.hidden_size
    of_all = model.hidden_size + normed + 2 * kv_heads
    return ELEMENT * (tokens * of_all + rows * (2 * heads + model.hidden_size + normed + inner))


def memory_bound(config: RunConfig, density: float, norms_again: bool) -> float:
    """A routed layer's :func:`kept_bytes` over the dense layer's, over the ratio of their FLOPs."""
    kept = kept_bytes(config, density, 1, norms_again) / kept_bytes(config, None, 1, False)
    return kept * layer_flops(config, 1.0) / layer_flops(config, density)


def step_operations(config: RunConfig, layers: Iterable[float | None], sequences: int) -> list[Operation]:
    """One micro-batch of a training step: its layers, embedding, head and loss, the fp32 sums of gradients,
    and its share of the optimizer's update (fp32 master weights, AdamW).

    Args:
        config: the run's configuration, vocabulary resolved; gives micro-batches a step too.
        layers: each layer's density, None for a dense one.
        sequences: in the micro-batch.
    """
    tokens = sequences * config.data.sequence_length
    hidden, logits = tokens * config.model.hidden_size, tokens * config.vocab_size
    weights = count_parameters(config)
    operations = [
        operation for density in layers for operation in layer_operations(config, density, sequences)
    ]
    return [
        *operations,
        *_product("head", tokens, config.model.hidden_size, config.vocab_size),
        _traffic("loss", 3 * logits),
        _traffic("embedding, last norm", 9 * hidden),
        Operation("gradient sums", "traffic", 0.0, GRADIENT_SUM * weights),
        Operation("update", "traffic", 0.0, UPDATE * weights / config.micro_batches),
    ]


class Floor(NamedTuple):
    """Least seconds of some operations, by kind."""

    matrix: float
    attention: float
    traffic: float

    @property
    def total(self) -> float:
        """Seconds of all."""
        return self.matrix + self.attention + self.traffic


def floor(operations: Iterable[Operation], device: Device, tiled: bool = False) -> Floor:
    """The least time of ``operations``, one after the other."""
    seconds = {"matrix": 0.0, "attention": 0.0, "traffic": 0.0}
    for operation in operations:
        seconds[operation.kind] += operation.seconds(device, tiled)
    return Floor(**seconds)


def layer_bound(config: RunConfig, density: float, sequences: int, device: Device, tiled: bool) -> float:
    """The best efficiency of skipping of a layer: (t_dense / t) x (FLOPs / FLOPs_dense) of the floors."""
    dense = floor(layer_operations(config, None, sequences), device, tiled).total
    packed = floor(layer_operations(config, density, sequences), device, tiled).total
    return dense / packed * layer_flops(config, density) / layer_flops(config, 1.0)


def step_bound(config: RunConfig, density: float, sequences: int, device: Device, tiled: bool) -> float:
    """The same of a whole step, all of whose layers are routed."""
    count = config.model.num_layers
    dense = floor(step_operations(config, [None] * count, sequences), device, tiled).total
    packed = floor(step_operations(config, [density] * count, sequences), device, tiled).total
    shares = dict.fromkeys(range(count), density)
    return dense / packed * forward_flops_per_token(config, shares) / forward_flops_per_token(config, {})


def _product(name: str, rows: float, inner: float, columns: float) -> list[Operation]:
    """A linear layer's three matrix products: forward, gradient of the input, gradient of the weight."""
    flops = 2 * rows * inner * columns
    moved = ELEMENT * (rows * inner + inner * columns + rows * columns)
    results = {"": (rows, columns), ", input's gradient": (rows, inner), ", weight's": (columns, inner)}
    return [Operation(name + suffix, "matrix", flops, moved, shape) for suffix, shape in results.items()]


def _traffic(name: str, elements: float) -> Operation:
    return Operation(name, "traffic", 0.0, ELEMENT * elements)


SHOWN: tuple[float | None, ...] = (None, 0.5, 0.25, 0.125)


def tables(config: RunConfig, device: Device) -> str:
    """Least times and best efficiencies of the model with and without grouped heads, as Markdown."""
    sequences, count = config.training.micro_batch_size, config.model.num_layers
    lines = [
        f"{device.name}, least times of a micro-batch in ms (tiles included), and the best efficiency:",
        "",
        "| | P | layer | matrices | attention | traffic | efficiency | step | traffic | efficiency |",
        "|---" * 10 + "|",
    ]
    for name, kv_heads in (("MHA", None), ("GQA", 4)):
        model = config.model.model_copy(update={"num_key_value_heads": kv_heads})
        shape = config.model_copy(update={"model": model})
        for density in SHOWN:
            layer = floor(layer_operations(shape, density, sequences), device, True)
            step = floor(step_operations(shape, [density] * count, sequences), device, True)
            bounds = ["", ""]
            if density is not None:
                bounds = [
                    f"{b(shape, density, sequences, device, True):.3f}" for b in (layer_bound, step_bound)
                ]
            times = [f"{seconds * 1e3:.2f}" for seconds in (layer.total, *layer)]
            whole = [f"{seconds * 1e3:.0f}" for seconds in (step.total, step.traffic)]
            cells = [name, "dense" if density is None else str(density), *times, bounds[0], *whole, bounds[1]]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def operation_table(config: RunConfig, device: Device) -> str:
    """Every operation of a layer at every density, forward and backward together, as Markdown."""
    sequences = config.training.micro_batch_size
    at: dict[str, dict[float | None, list[Operation]]] = {}
    for density in SHOWN:
        for operation in layer_operations(config, density, sequences):
            kind = at.setdefault(operation.name.split(",")[0], {})
            kind.setdefault(density, []).append(operation)
    lines = ["| GFLOP, MB, us | " + " | ".join("dense" if p is None else f"P={p}" for p in SHOWN) + " |"]
    lines.append("|---" * (len(SHOWN) + 1) + "|")
    for name, by_density in at.items():
        cells = []
        for density in SHOWN:
            parts = by_density.get(density, [])
            seconds = sum(part.seconds(device, tiled=True) for part in parts)
            flops, moved = sum(part.flops for part in parts), sum(part.bytes for part in parts)
            cells.append(f"{flops / 1e9:.0f}, {moved / 1e6:.0f}, {seconds * 1e6:.0f}" if parts else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
