"""Which libraries and kernels a run will use on this machine, in a few lines for its log."""

import platform
from importlib import metadata

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend

from skipmega.config import RunConfig
from skipmega.kernels.attention import choose_attention

_LENGTH = 1024  # tokens; the choice does not depend on more


def describe_libraries(device: torch.device) -> str:
    """Versions of what computes and communicates."""
    versions = [f"python {platform.python_version()}"]
    versions += [f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed", "megatron-core")]
    if device.type == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        versions += [f"triton {metadata.version('triton')}", f"CUDA {torch.version.cuda}", f"NCCL {nccl}"]
        versions.append(torch.cuda.get_device_name(device))
    else:
        versions.append(f"{dist.get_backend()} (torch's), {torch.get_num_threads()} threads")
    return ", ".join(versions)


def describe_kernels(config: RunConfig, device: torch.device) -> str:
    """What a run of this configuration computes with: attention, compilation, optimizer."""
    training, fused = config.training, device.type == "cuda" and config.optimizer.name == "adamw"
    attention: str = choose_attention(training.attention, device, training.compile, config.model.head_size)
    if attention == "sdpa":
        causal, masked = (_sdpa_kernel(config, device, masked) for masked in (False, True))
        attention = f"sdpa ({causal} where causality is the only mask, else {masked})"
    compiled = "compiled" if training.compile else "not compiled"
    if training.cuda_graphs:
        compiled += ", in CUDA graphs"
    optimizer = f"{config.optimizer.name}{' (fused)' if fused else ''}, ZeRO {config.parallel.zero_stage}"
    return f"{training.precision}, layers {compiled}; attention: {attention}; {optimizer}"


def _sdpa_kernel(config: RunConfig, device: torch.device, masked: bool) -> str:
    """The one of its kernels that torch chooses for heads of this run; executed tokens, documents and context
    parallelism bring a mask."""
    model, length = config.model, min(config.data.sequence_length, _LENGTH)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    query, key = (
        torch.empty(1, count, length, model.head_size, dtype=dtype, device=device, requires_grad=True)
        for count in (model.num_attention_heads, model.kv_heads)
    )
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device) if masked else None
    grouped = model.kv_heads != model.num_attention_heads
    chosen = torch._fused_sdp_choice(query, key, key, mask, 0.0, not masked, enable_gqa=grouped)
    return SDPBackend(chosen).name.removesuffix("_ATTENTION").lower().replace("_", " ")
