"""The training state in logical form: fp32 weights and optimizer moments by parameter name.

DeepSpeed's public ``safe_get_full_*`` family assembles what ZeRO scattered over the data ranks; what is
left is cut over the tensor axis only. Every data rank takes part in both directions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
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


class HostBuffers:
    """Host memory that one checkpoint's share of this process is copied into, the same every time.

    Args:
        device: where the state lives; for a GPU the memory is page-locked.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def take_share(self, engine: TrainingEngine) -> dict[str, LogicalTensor]:
        """Copy the tensors that this process is to write, keyed as by :func:`collect_state`; collective.

        Among the ranks that hold the same weights, each tensor goes to the one with the least so far.
        """
        replicas, share = engine.grid.replicas, {}
        loads = [0] * replicas.size
        for key, tensor in _logical_state(engine):
            owner = loads.index(min(loads))
            loads[owner] += tensor.local.numel()
            if owner == replicas.rank:
                share[key] = LogicalTensor(self._copy(key, tensor.local), tensor.dim)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return share

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        if key not in self._buffers:
            pinned = self._device.type == "cuda"
            self._buffers[key] = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=pinned)
        return self._buffers[key].copy_(tensor.detach(), non_blocking=True)


def collect_state(engine: TrainingEngine) -> dict[str, LogicalTensor]:
    """Copies on the CPU, float32, keyed ``weights/NAME``, ``optimizer/MOMENT/NAME`` and ``routing/NAME``."""
    return {
        key: LogicalTensor(tensor.local.detach().to("cpu", torch.float32, copy=True), tensor.dim)
        for key, tensor in _logical_state(engine)
    }


def _logical_state(engine: TrainingEngine) -> Iterator[tuple[str, LogicalTensor]]:
    """One tensor after the other, whole but for the tensor axis, so that there is never more than one."""
    for name, parameter in engine.stage.named_parameters():
        dim = partition_dim(parameter)
        yield f"weights/{name}", LogicalTensor(safe_get_full_fp32_param(parameter), dim)
        for moment in _full_moments(engine, parameter):
            whole = safe_get_full_optimizer_state(parameter, moment)
            yield f"optimizer/{moment}/{name}", LogicalTensor(whole, dim)
    yield from _factored_moments(engine)
    for name, live in engine.routing_tensors().items():
        yield f"routing/{name}", LogicalTensor(live, None)


def restore_state(engine: TrainingEngine, updates: int, state: Mapping[str, LogicalTensor]) -> None:
    """Put a saved state back.

    Args:
        engine: any that was made from the same configuration.
        updates: optimizer updates done so far.
        state: all of what :func:`collect_state` returns.
    """
    set_updates_done(engine.optimizer, updates)
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


@dataclass(frozen=True)
class Held:
    """What a rank has of a parameter, live: the ``copy`` it computes with (with ZeRO 3 the piece of it), and
    of the piece that it alone owns, which may be empty, that of the copy, the fp32 ``master`` and the
    ``moments`` by name."""

    copy: Tensor
    piece: Tensor
    master: Tensor
    moments: dict[str, Tensor]

    def master_as_copy(self) -> Tensor:
        """The master in the copy's precision, as it was copied after the last update."""
        return self.master.to(self.piece.dtype)


def hold(engine: TrainingEngine, parameter: nn.Parameter) -> Held:
    """What this rank has of ``parameter``."""
    moments = _full_moments(engine, parameter)
    if engine.config.parallel.zero_stage == 3:
        piece = parameter.ds_tensor  # type: ignore[attr-defined]
        states = {name: safe_get_local_optimizer_state(parameter, name) for name in moments}
        return Held(piece, piece, safe_get_local_fp32_param(parameter), states)
    owned = parameter._hp_mapping  # type: ignore[attr-defined]
    if owned is None:
        return Held(parameter, parameter.new_empty(0), parameter.new_empty(0, dtype=torch.float32), {})
    where = owned.lp_fragment_address
    piece = parameter.flatten().narrow(0, where.start, where.numel)
    states = {name: owned.get_hp_fragment(name) for name in moments}
    return Held(parameter, piece, owned.get_hp_fragment(), states)


@torch.no_grad()
def renew_copies(engine: TrainingEngine) -> None:
    """Give every rank anew the weights that the fp32 masters say; collective. With ZeRO 3, which keeps no
    copies, it does nothing."""
    if engine.config.parallel.zero_stage < 3:
        for parameter in engine.stage.parameters():
            parameter.copy_(safe_get_full_fp32_param(parameter))


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
