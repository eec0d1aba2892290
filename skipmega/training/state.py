"""The training state in logical form: fp32 weights and optimizer moments by parameter name.

DeepSpeed's public ``safe_get_full_*`` family assembles what ZeRO scattered over the data ranks; what is
left is cut over the tensor axis only. Every data rank takes part in both directions.
"""

from collections.abc import Callable, Iterator

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from skipmega.parallel.logical import LogicalTensor, partition_dim
from skipmega.training.adafactor import ShardedAdafactor
from skipmega.training.engine import TrainingEngine

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")

ReadTensors = Callable[[dict[str, LogicalTensor]], None]


def collect_state(engine: TrainingEngine) -> dict[str, LogicalTensor]:
    """Copies on the CPU, float32, keyed ``weights/NAME`` and ``optimizer/MOMENT/NAME``."""
    state: dict[str, LogicalTensor] = {}
    for name, parameter in engine.stage.named_parameters():
        dim = partition_dim(parameter)
        state[f"weights/{name}"] = LogicalTensor(_to_cpu(safe_get_full_fp32_param(parameter)), dim)
        for moment in _full_moments(engine, parameter):
            whole = _to_cpu(safe_get_full_optimizer_state(parameter, moment))
            state[f"optimizer/{moment}/{name}"] = LogicalTensor(whole, dim)
    for key, tensor in _factored_moments(engine):
        state[key] = LogicalTensor(_to_cpu(tensor.local), tensor.dim)
    return state


def restore_state(engine: TrainingEngine, updates: int, read: ReadTensors) -> None:
    """Put a saved state back.

    Args:
        engine: a fresh engine.
        updates: optimizer updates done so far.
        read: fills the tensors of a dict like :func:`collect_state`'s in place.
    """
    _create_moments(engine, updates)
    state = collect_state(engine)
    read(state)
    device = engine.grid.device
    for name, parameter in engine.stage.named_parameters():
        weight = state[f"weights/{name}"].local.to(device)
        safe_set_full_fp32_param(parameter, weight)
        with torch.no_grad():
            parameter.copy_(weight)
        for moment in _full_moments(engine, parameter):
            safe_set_full_optimizer_state(
                parameter, state[f"optimizer/{moment}/{name}"].local.to(device), moment
            )
    for key, tensor in _factored_moments(engine):
        tensor.local.copy_(state[key].local)


def optimizer_updates(engine: TrainingEngine) -> int:
    """Updates the optimizer has done (its own count, which bias correction uses)."""
    base = engine.optimizer.optimizer
    if isinstance(base, ShardedAdafactor):
        return base.updates
    counts = {int(state["step"]) for state in base.state.values()}
    return counts.pop() if counts else 0


def _create_moments(engine: TrainingEngine, updates: int) -> None:
    """Give a fresh optimizer the (zero) moments it would only make in its first step."""
    zero, base = engine.optimizer, engine.optimizer.optimizer
    if isinstance(base, ShardedAdafactor):
        base.updates = updates
        base.create_moments()
    else:
        for piece in zero.single_partition_of_fp32_groups:
            count = torch.tensor(float(updates), device=piece.device if base.defaults["fused"] else "cpu")
            moments = {moment: torch.zeros_like(piece) for moment in ADAM_MOMENTS}
            base.state[piece] = {"step": count, **moments}
    zero._lazy_init_hp_params_optimizer_state()


def _full_moments(engine: TrainingEngine, parameter: nn.Parameter) -> tuple[str, ...]:
    """Names of the moments that have the parameter's shape."""
    if isinstance(engine.optimizer.optimizer, ShardedAdafactor):
        return () if parameter.dim() == 2 else ("full",)
    return ADAM_MOMENTS


def _factored_moments(engine: TrainingEngine) -> Iterator[tuple[str, LogicalTensor]]:
    """Adafactor's row and column moments, the live tensors; rows are cut if the matrix's rows are."""
    base = engine.optimizer.optimizer
    if not isinstance(base, ShardedAdafactor):
        return
    for group in base.param_groups:
        layout, (piece,) = group["layout"], group["params"]
        if layout.is_factored:
            for moment, dim in (("row", 0), ("column", 1)):
                cut = 0 if layout.partition_dim == dim else None
                yield f"optimizer/{moment}/{layout.name}", LogicalTensor(base.state[piece][moment], cut)


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
