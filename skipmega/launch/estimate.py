"""What a configuration costs, before anything runs: parameters, operations, memory of a process, time.

All of it follows from the configuration: no process group, no data and no weights are made.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skipmega.config import RunConfig, resolve_grid, resolve_vocabulary
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import ConfigError
from skipmega.models.flops import (
    LayerParts,
    active_parameters,
    computed_share,
    count_parameters,
    embedding_parameters,
    matrix_parameters,
    part_shares,
    target_shares,
    training_flops_per_token,
)
from skipmega.models.stages import cut_stages
from skipmega.routing.router import Router

GIB = 2**30
_MASTER = 4  # bytes of a weight's fp32 copy, and of each of its moments
_EAGER_LOGIT = 12  # bytes in backward: log-probability, its gradient and the logit's, in fp32
_EVALUATED_LOGIT = 8  # bytes: the logit in fp32 and its log-probability; evaluation is eager
_BUCKET = 500_000_000  # elements that DeepSpeed sets aside for reducing gradients


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes on one process of pipeline stage ``stage`` (0-based), the stage that needs most.

    ``weights`` in the run's precision, ``gradients`` in theirs (ZeRO 2 saves none of the latter: a whole
    step's pile up before they are reduced). ``optimizer``: fp32 weights and moments, its share over the
    data-parallel ranks. ``activations`` of the micro-batches in flight, as compiled (eager execution keeps up
    to half as much again, and masks), and ``logits`` with their gradients. ``update``: what reducing
    gradients, updating weights or evaluating need, when the activations are gone. What libraries and
    communication allocate is left out.
    """

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    update: float

    @property
    def total(self) -> float:
        """The peak: activations and the update don't meet."""
        states = self.weights + self.gradients + self.optimizer
        return states + max(self.activations + self.logits, self.update)


@dataclass(frozen=True)
class Estimate:
    """What a run costs. Parameters in numbers; ``active_parameters`` are those a token meets on average.

    ``effective_depth`` is the sum of the layers' densities (Eff-L). ``executed_flops`` and ``dense_flops``:
    forward and backward operations per token, at the target densities and as if no layer were skipped.
    ``tokens`` and ``seconds`` are those of the whole run, the latter at model-FLOPs utilisation ``mfu`` of
    ``peak_tflops`` (10^12 operations per second) on each of ``processes`` devices.
    """

    name: str
    layers: int
    parameters: int
    layer_parameters: int
    embedding_parameters: int
    active_parameters: float
    effective_depth: float
    executed_flops: float
    dense_flops: float
    grid: str
    processes: int
    memory: ProcessMemory
    tokens: int
    mfu: float
    peak_tflops: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the memory's total included."""
        values = asdict(self)
        values["memory"]["total"] = self.memory.total
        return values


def estimate(
    config: RunConfig, processes: int = 1, mfu: float = 0.4, peak_tflops: float = 989.0, name: str = ""
) -> Estimate:
    """Estimate a run.

    Args:
        config: the run's configuration; vocabulary and grid need not be resolved.
        processes: number of devices.
        mfu: share of the peak that executed operations reach, 0 to 1.
        peak_tflops: of one device, 10^12 operations per second.
        name: shown with the result; left out, ``run_dir``.

    Raises:
        ConfigError: the vocabulary is unknown, the grid does not fit, or ``mfu``, ``peak_tflops`` or
            ``processes`` cannot be.
    """
    if processes < 1 or not 0 < mfu <= 1 or not 0 < peak_tflops < float("inf"):
        raise ConfigError(
            f"processes={processes}, mfu={mfu}, peak_tflops={peak_tflops}: give at least 1 process, a share "
            "greater than 0 and at most 1, and a positive number"
        )
    config = resolve_grid(with_vocabulary(config), processes)
    parallel, training = config.parallel, config.training
    shares = target_shares(config)
    executed = training_flops_per_token(config, shares)
    tokens = training.steps * training.global_batch_size * config.data.sequence_length
    parameters, embedding = count_parameters(config), embedding_parameters(config)
    return Estimate(
        name=name or config.run_dir,
        layers=config.model.num_layers,
        parameters=parameters,
        layer_parameters=parameters - embedding - config.model.hidden_size,
        embedding_parameters=embedding,
        active_parameters=active_parameters(config, shares),
        effective_depth=sum(config.densities.get(layer, 1.0) for layer in range(config.model.num_layers)),
        executed_flops=executed,
        dense_flops=training_flops_per_token(config),
        grid=f"TP{parallel.tensor_parallel} PP{parallel.pipeline_parallel} DP{parallel.data_parallel} "
        f"ZeRO-{parallel.zero_stage}",
        processes=processes,
        memory=process_memory(config),
        tokens=tokens,
        mfu=mfu,
        peak_tflops=peak_tflops,
        seconds=tokens * executed / (processes * peak_tflops * 1e12 * mfu),
    )


def with_vocabulary(config: RunConfig) -> RunConfig:
    """``config`` with its vocabulary resolved: the one it names, else its tokenizer's if that is there.

    Raises:
        ConfigError: neither is there.
    """
    if config.model.vocab_size is not None:
        return resolve_vocabulary(config, None)
    path = config.data.tokenizer
    if path is None or not Path(path).is_file():
        there = "data.tokenizer is not set" if path is None else f"data.tokenizer={path} is not there"
        raise ConfigError(
            f"the size of the vocabulary is unknown: model.vocab_size is not set and {there}; give "
            "model.vocab_size=32000, say"
        )
    return resolve_vocabulary(config, Tokenizer.load(path).size)


def process_memory(config: RunConfig) -> ProcessMemory:
    """Memory of one process of the stage that needs most.

    Args:
        config: the run's configuration, vocabulary and grid resolved.
    """
    stages = [_stage_memory(config, stage) for stage in range(config.parallel.pipeline_parallel)]
    return max(stages, key=lambda memory: memory.total)


def _stage_memory(config: RunConfig, stage: int) -> ProcessMemory:
    parallel, replicas = config.parallel, config.parallel.data_parallel or 1
    weights = _stage_parameters(config, stage)
    size = _element_size(config)
    adamw = config.optimizer.name == "adamw"
    in_flight = min(parallel.pipeline_parallel - stage, config.micro_batches)
    is_last = stage == parallel.pipeline_parallel - 1
    summed = size if config.training.gradient_precision == "bf16" else _MASTER
    activations = _stage_activations(config, stage)
    # of Adafactor's moments nothing is left but rows and columns; its step holds directions beside gradients
    logits = _tokens(config) * config.vocab_size / parallel.tensor_parallel if is_last else 0.0
    update = max(
        _BUCKET * summed,
        weights * (1 if adamw else 2) * _MASTER / replicas,
        logits * (_EVALUATED_LOGIT + (size if size < _MASTER else 0)),
    )
    return ProcessMemory(
        stage=stage,
        weights=weights * size,
        gradients=weights * summed,
        optimizer=weights * (3 if adamw else 1) * _MASTER / replicas,
        activations=in_flight * activations + _recomputed(config, stage),
        logits=logits * _logit_bytes(config),
        update=update,
    )


def _layers_of(config: RunConfig, stage: int) -> list[int]:
    return [layer for chunk in cut_stages(config)[stage] for layer in chunk]


def _stage_parameters(config: RunConfig, stage: int) -> float:
    """Weights on one tensor-parallel rank of a stage: matrices cut, norms and routers whole."""
    model, parallel = config.model, config.parallel
    tensor, last = parallel.tensor_parallel, parallel.pipeline_parallel - 1
    layers = _layers_of(config, stage)
    routed = sum(layer in layers for layer in config.routed_layers)
    each = sum(matrix_parameters(config)) / tensor + 2 * model.hidden_size
    count = len(layers) * each
    count += routed * Router.parameter_count(config.routing, model.hidden_size)
    table = config.vocab_size * model.hidden_size / tensor
    tables = 1 if last == 0 and model.tie_embeddings else (stage == 0) + (stage == last)
    return count + tables * table + (model.hidden_size if stage == last else 0)


def _stage_activations(config: RunConfig, stage: int) -> float:
    """Bytes that a stage keeps of one micro-batch for backward."""
    layers = _layers_of(config, stage)
    if config.training.recompute == "full":
        return len(layers) * _tokens(config) * config.model.hidden_size * _element_size(config)
    return sum(_layer_activations(config, layer, config.training.recompute) for layer in layers)


def _recomputed(config: RunConfig, stage: int) -> float:
    """Bytes of the layer that is run again in backward, of which there is one at a time."""
    if config.training.recompute == "none":
        return 0.0
    layers = _layers_of(config, stage)
    return max(_layer_activations(config, layer, "none") for layer in layers)


def _layer_activations(config: RunConfig, layer: int, recompute: str) -> float:
    """Bytes that one layer keeps of one micro-batch for backward, on one tensor-parallel rank.

    What torch's min-cut partitioner keeps: the layer's input, the inputs of all matrix products (the
    router's in fp32), queries, keys, values, attention's output and the feed-forward network before and
    after its activation. Masks are not made, small things are left out. Of what ``recompute`` names, only the
    input is kept.
    """
    model, routing, tensor = config.model, config.routing, config.parallel.tensor_parallel
    hidden, ffn = model.hidden_size, model.ffn_size / tensor
    heads = model.num_attention_heads * model.head_size / tensor
    kv_heads = model.kv_heads * model.head_size / tensor
    routed = config.layer_is_routed(layer)
    packs_queries = routed and not routing.computes_all and routing.keys_values == "all"
    packs_queries = packs_queries and routing.wrap != "mlp"
    inner = 3 if model.activation == "swiglu" else 2
    widths = LayerParts(
        keys_values=hidden + (recompute != "attention") * 2 * kv_heads,
        queries=(recompute != "attention") * 3 * heads + packs_queries * hidden,
        mlp=(1 + routed) * hidden + (recompute != "mlp") * inner * ffn,
    )
    rows = part_shares(config, computed_share(config, layer))
    kept = hidden + sum(width * share for width, share in zip(widths, rows, strict=True))
    size = _element_size(config)
    for_router = 4 * hidden if routed and routing.scores_tokens and size < 4 else 0
    return _tokens(config) * (kept * size + for_router)


def _logit_bytes(config: RunConfig) -> int:
    """What backward of the loss holds per logit; a compiled one never makes fp32 of them."""
    if config.training.compile and config.parallel.tensor_parallel == 1:
        return 2 * _element_size(config)
    return _EAGER_LOGIT


def _tokens(config: RunConfig) -> int:
    """Tokens of a micro-batch."""
    return config.training.micro_batch_size * config.data.sequence_length


def _element_size(config: RunConfig) -> int:
    return 2 if config.training.precision == "bf16" else 4


def describe(result: Estimate) -> str:
    """An estimate in words and lines."""
    memory = result.memory
    names = ("weights", "gradients", "optimizer", "activations", "logits", "update")
    lines = {
        "parameters": f"{_count(result.parameters)}: {_count(result.layer_parameters)} in {result.layers} "
        f"layers, {_count(result.embedding_parameters)} in embeddings; a token meets "
        f"{_count(result.active_parameters)}",
        "Eff-L": f"{result.effective_depth:.2f} of {result.layers} layers (sum of densities)",
        "FLOPs": f"{result.executed_flops / 1e9:.3f} G per token executed, "
        f"{result.dense_flops / 1e9:.3f} G as if dense (forward and backward)",
        "memory": f"{memory.total / GIB:.1f} GiB on a process of stage {memory.stage} ({result.grid})",
        "  of it": ", ".join(f"{name} {getattr(memory, name) / GIB:.1f}" for name in names),
        "tokens": _count(result.tokens),
        "time": f"{_duration(result.seconds)} on {result.processes} x {result.peak_tflops:g} TFLOP/s at MFU "
        f"{result.mfu:.0%}",
    }
    return "\n".join([result.name, *(f"  {what:<10}  {value}" for what, value in lines.items())])


def table(results: Sequence[Estimate]) -> str:
    """Estimates side by side; ``rel`` is executed FLOPs relative to the first one's."""
    first = results[0].executed_flops
    columns = [("config", [result.name for result in results])]
    columns += [
        (heading, [cell(result) for result in results])
        for heading, cell in {
            "params": lambda result: _count(result.parameters),
            "layers": lambda result: _count(result.layer_parameters),
            "embed": lambda result: _count(result.embedding_parameters),
            "active": lambda result: _count(result.active_parameters),
            "L": lambda result: str(result.layers),
            "Eff-L": lambda result: f"{result.effective_depth:.2f}",
            "GF/token": lambda result: f"{result.executed_flops / 1e9:.3f}",
            "if dense": lambda result: f"{result.dense_flops / 1e9:.3f}",
            "rel": lambda result: f"{result.executed_flops / first:.3f}",
            "GiB": lambda result: f"{result.memory.total / GIB:.1f}",
            "time": lambda result: _duration(result.seconds),
        }.items()
    ]
    padded: list[list[str]] = []
    for heading, cells in columns:
        width = max(map(len, [heading, *cells]))
        align = str.rjust if padded else str.ljust
        padded.append([align(cell, width) for cell in [heading, *cells]])
    return "\n".join("  ".join(row) for row in zip(*padded, strict=True))


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
