"""What a configuration costs, before anything runs: parameters, operations, memory of a process, time.

All of it follows from the configuration: no process group, no data and no weights are made.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skipmega.config import ParallelConfig, RunConfig, resolve_grid, resolve_vocabulary
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import ConfigError
from skipmega.launch.memory import ProcessMemory, process_memory
from skipmega.models.flops import (
    active_parameters,
    count_parameters,
    embedding_parameters,
    target_shares,
    training_flops_per_token,
)

GIB = 2**30


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
    training = config.training
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
        grid=_grid(config.parallel),
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


def _grid(parallel: ParallelConfig) -> str:
    sequence = " SP" if parallel.sequence_parallel else ""
    context = f" CP{parallel.context_parallel}" if parallel.context_parallel > 1 else ""
    chunks = f" ({parallel.chunks_per_stage} chunks)" if parallel.chunks_per_stage > 1 else ""
    return (
        f"TP{parallel.tensor_parallel}{sequence}{context} PP{parallel.pipeline_parallel}{chunks} "
        f"DP{parallel.data_parallel} ZeRO-{parallel.zero_stage}"
    )


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
