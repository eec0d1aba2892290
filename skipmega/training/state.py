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
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn import functional

from skipmega.parallel.logical import LogicalTensor, partition_dim
from skipmega.training.adafactor import ShardedAdafactor
from skipmega.training.engine import TrainingEngine
from skipmega.training.optimizers import ADAM_MOMENTS, set_updates_done

ReadTensors = Callable[[dict[str, LogicalTensor]], None]


def collect_state(engine: TrainingEngine) -> dict[str, LogicalTensor]:
    """Copies on the CPU, float32, keyed ``weights/NAME``, ``optimizer/MOMENT/NAME`` and ``routing/NAME``."""
    state: dict[str, LogicalTensor] = {}
    for name, parameter in engine.stage.named_parameters():
        dim = partition_dim(parameter)
        state[f"weights/{name}"] = LogicalTensor(_to_cpu(safe_get_full_fp32_param(parameter)), dim)
        for moment in _full_moments(engine, parameter):
            whole = _to_cpu(safe_get_full_optimizer_state(parameter, moment))
            state[f"optimizer/{moment}/{name}"] = LogicalTensor(whole, dim)
    for key, tensor in _factored_moments(engine):
        state[key] = LogicalTensor(_to_cpu(tensor.local), tensor.dim)
    for name, live in engine.routing_tensors().items():
        state[f"routing/{name}"] = LogicalTensor(_to_cpu(live), None)
    return state


def restore_state(engine: TrainingEngine, updates: int, read: ReadTensors) -> None:
    """Put a saved state back.

    Args:
        engine: a fresh engine.
        updates: optimizer updates done so far.
        read: fills the tensors of a dict like :func:`collect_state`'s in place.
    """
    set_updates_done(engine.optimizer, updates)
    state = collect_state(engine)
    read(state)
    device = engine.grid.device
    set_weight, set_moment = _set_weight, safe_set_full_optimizer_state
    if engine.config.parallel.zero_stage == 3:
        engine.release_gathered()
        set_weight, set_moment = _set_cut_weight, _set_cut_moment
    for name, parameter in engine.stage.named_parameters():
        set_weight(parameter, state[f"weights/{name}"].local.to(device))
        for moment in _full_moments(engine, parameter):
            set_moment(parameter, state[f"optimizer/{moment}/{name}"].local.to(device), moment)
    for key, tensor in _factored_moments(engine):
        tensor.local.copy_(state[key].local)
    for name, live in engine.routing_tensors().items():
        live.copy_(state[f"routing/{name}"].local)


@torch.no_grad()
def _set_weight(parameter: nn.Parameter, weight: Tensor) -> None:
    safe_set_full_fp32_param(parameter, weight)
    parameter.copy_(weight)


@torch.no_grad()
def _set_cut_weight(parameter: nn.Parameter, weight: Tensor) -> None:
    piece = _piece_of_rank(parameter, weight)
    safe_set_local_fp32_param(parameter, piece)
    parameter.ds_tensor.copy_(piece)  # type: ignore[attr-defined]


def _set_cut_moment(parameter: nn.Parameter, whole: Tensor, moment: str) -> None:
    safe_set_local_optimizer_state(parameter, _piece_of_rank(parameter, whole), moment)


def _piece_of_rank(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """What ZeRO 3 keeps of ``whole`` on this rank, filled up with zeros at the end.

    DeepSpeed's setters of whole tensors fail where the ranks do not divide them.
    """
    numel = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    group = parameter.ds_process_group  # type: ignore[attr-defined]
    padded = functional.pad(whole.flatten(), (0, numel * group.size() - whole.numel()))
    return padded.narrow(0, numel * group.rank(), numel)


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
        (piece,) = group["params"]
        for fragment in group["fragments"] if group["kind"] == "matrices" else []:
            for moment, dim in (("row", 0), ("column", 1)):
                cut = 0 if fragment.dim == dim else None
                live = base.state[piece][f"{moment}/{fragment.name}"]
                yield f"optimizer/{moment}/{fragment.name}", LogicalTensor(live, cut)


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
