"""One rank looks at files, all ranks know what it found."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from skipmega.errors import DataError

_Result = TypeVar("_Result")


def rank() -> int:
    """This process's rank; 0 where torch.distributed is not initialised."""
    return dist.get_rank() if dist.is_initialized() else 0


def from_all_ranks(value: Any) -> list[Any]:
    """Each rank's ``value``, by rank; collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(function: Callable[[], _Result]) -> _Result:
    """``function()`` of rank 0, returned on every rank; so is the :class:`DataError` that it raised."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except DataError as error:
            outcome[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise DataError(outcome[1])
    return cast(_Result, outcome[0])
