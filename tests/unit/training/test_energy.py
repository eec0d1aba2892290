"""Energy where devices tell it, and nothing where they do not."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skipmega.training.energy import describe_energy, energy_source
from skipmega.training.metrics import StepMeter

UUID = "12345678-1234-1234-1234-123456789abc"


class NVMLError(Exception):
    """As NVML's."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An NVML with one GPU, whose counter stands at ``millijoules``; None: it tells nothing."""
    fake = SimpleNamespace(NVMLError=NVMLError, millijoules=5_000_000, nvmlInit=lambda: None)

    def handle_of(uuid: str) -> str:
        assert uuid == f"GPU-{UUID}"
        return "handle"

    def consumed(handle: str) -> int:
        assert handle == "handle"
        if fake.millijoules is None:
            raise NVMLError("not supported")
        return fake.millijoules

    fake.nvmlDeviceGetHandleByUUID = handle_of
    fake.nvmlDeviceGetTotalEnergyConsumption = consumed
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties: Any = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return fake


def test_a_gpu_tells_the_joules_of_steps_alone(nvml: SimpleNamespace) -> None:
    source = energy_source(torch.device("cuda", 0))
    assert source is not None
    assert "NVML's counters" in describe_energy(torch.device("cuda", 0))
    meter = StepMeter(source)
    nvml.millijoules += 2_000
    meter.pause()
    nvml.millijoules += 70_000
    meter.resume()
    nvml.millijoules += 1_000
    assert meter.read() == pytest.approx(3)
    assert meter.read() == 0


def test_where_nothing_is_told_there_is_no_meter(
    nvml: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert energy_source(torch.device("cpu")) is None
    assert "not available" in describe_energy(torch.device("cpu"))
    nvml.millijoules = None
    assert energy_source(torch.device("cuda", 0)) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_source(torch.device("cuda", 0)) is None
