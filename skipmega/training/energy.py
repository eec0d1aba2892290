"""What the job's devices consume, where they tell."""

from collections.abc import Callable

import torch
import torch.distributed as dist

MILLI = 1e-3


def energy_source(device: torch.device) -> Callable[[], float] | None:
    """Reads the joules that ``device`` has consumed since some time in the past; None where it does not tell:
    CPUs, GPUs before Volta, parts of a GPU, hosts without NVML."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: MILLI * pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)


def describe_energy(device: torch.device) -> str:
    """One line: whether records will tell what ``device`` consumes."""
    if energy_source(device) is None:
        return "joules per token not available: no NVML counter"
    return "joules per token of all devices, from NVML's counters"


def of_all_devices(joules: float | None, device: torch.device) -> float | None:
    """The sum over all processes, each with a device of its own; None if one does not know.

    All processes call it together; where none have met, there is only this one.
    """
    if not dist.is_initialized():
        return joules
    known = torch.tensor([joules or 0.0, float(joules is None)], device=device)
    dist.all_reduce(known)
    total, unknown = known.tolist()
    return None if unknown else total
