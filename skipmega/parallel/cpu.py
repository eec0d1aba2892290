"""What makes a CPU host work: megatron-core and DeepSpeed assume accelerators and compilers.

megatron-core asks ``torch.cuda.current_device()`` for buffers and writes ``device="cuda"`` into its
schedules. On a CPU host the name ``torch`` inside exactly those modules is bound to a stand-in that
answers "cpu" and forwards everything else; torch itself stays untouched. DeepSpeed would compile its
shared-memory collectives (a compiler, a minute, and a lock file that a killed process leaves behind);
gloo does without.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import deepspeed.ops
import torch
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.tensor_parallel import layers, mappings


def run_megatron_on_cpu(*others: ModuleType) -> None:
    """Bind the CPU stand-in into megatron-core, and ``others`` of its modules that are rarely imported, and
    keep DeepSpeed from compiling; safe to call twice."""
    for module in (schedules, p2p_communication, layers, mappings, *others):
        if not isinstance(module.torch, _TorchOnCpu):
            module.torch = _TorchOnCpu()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class _CudaOnCpu(ModuleType):
    """``torch.cuda`` as megatron-core uses it, answered by a CPU host."""

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize() -> None:
        return

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _TorchOnCpu(ModuleType):
    """``torch`` with "cuda" in tensor factories read as "cpu"."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaOnCpu("torch.cuda")
        self.zeros = _on_cpu(torch.zeros)
        self.empty = _on_cpu(torch.empty)
        self.tensor = _on_cpu(torch.tensor)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create
