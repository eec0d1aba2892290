"""From a native checkpoint to a checked export."""

from pathlib import Path

import torch
from torch import Tensor

from skipmega.checkpoint.store import Checkpoint
from skipmega.errors import CheckpointError
from skipmega.hf.export import verify_export, write_export
from skipmega.inference.configuration import with_eval_density
from skipmega.inference.native import NativeModel
from skipmega.parallel.grid import create_grid, end_communication
from skipmega.parallel.process import ProcessInfo
from skipmega.routing.state import RoutingState

_COMPARED_ROWS, _COMPARED_LENGTH = 2, 256


def export_checkpoint(
    checkpoint: Checkpoint,
    out: str | Path,
    dtype: str,
    tolerance: float,
    eval_density: float | None = None,
) -> float | None:
    """Export, load what was written, and compare its logits with the native model's in fp32.

    Runs in one process, whatever grid wrote the checkpoint.

    Args:
        checkpoint: a complete one.
        out: the folder to write.
        dtype: "fp32" or "bf16", of the exported weights.
        tolerance: largest allowed absolute logit difference.
        eval_density: share of tokens to execute in each routed layer; None as the checkpoint's configuration
            says.

    Returns:
        The largest difference; None for bf16, whose rounding moves routers over their threshold, so that
        logits of a few tokens differ by their nature.

    Raises:
        CheckpointError: a difference over ``tolerance``, or a folder that must not be replaced.
        ConfigError: the model has no Hugging Face form, or ``eval_density`` no meaning for it.
    """
    config = with_eval_density(checkpoint.config, eval_density)
    routing = RoutingState(config, config.routed_layers, torch.device("cpu"))
    routing.load(_remembered(checkpoint, routing))
    exported = torch.bfloat16 if dtype == "bf16" else torch.float32
    write_export(
        out,
        config,
        checkpoint.read_weights(),
        config.data.tokenizer,
        routing,
        checkpoint.state["step"],
        dtype=exported,
    )
    if dtype == "bf16":
        return None
    tokens = _random_tokens(config.vocab_size, min(_COMPARED_LENGTH, config.data.sequence_length))
    grid = create_grid(ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="none"))
    try:
        native = NativeModel.load(checkpoint, grid, eval_density=eval_density).logits(tokens).cpu()
    finally:
        end_communication()
    return verify_export(out, native, tokens, tolerance)


def _remembered(checkpoint: Checkpoint, routing: RoutingState) -> dict[str, Tensor]:
    tensors = checkpoint.read_routing()
    missing = sorted(routing.tensors().keys() - tensors.keys())
    if missing:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} lacks {len(missing)} tensors of the routers' state "
            f"{missing[:3]}: it was written by an older skipmega, export it with that one"
        )
    return tensors


def _random_tokens(vocab_size: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (_COMPARED_ROWS, length), generator=generator)
