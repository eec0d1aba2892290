"""What the doctor says of a GPU, with an NVML that answers as it is told, and of one process without any."""

import re
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from skipmega.config import RunConfig, load_config
from skipmega.launch import doctor
from skipmega.launch.backends import describe_kernels
from skipmega.launch.gpu_health import GpuHealth, read_health
from support.tiny_run import run_command

CPU = torch.device("cpu")
SOUND = {
    "nvmlDeviceGetRemappedRows": (1, 2, 0, 0),
    "nvmlDeviceGetTemperature": 56,
    "nvmlDeviceGetTotalEccErrors": {pynvml.NVML_VOLATILE_ECC: 0, pynvml.NVML_AGGREGATE_ECC: 4},
    "nvmlDeviceGetCurrentClocksEventReasons": pynvml.nvmlClocksEventReasonSwPowerCap,
    "nvmlSystemGetDriverVersion": "580.65",
}
NOT_SUPPORTED = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Answers by function, to be changed; an exception is raised."""
    answers: dict[str, Any] = {"nvmlInit": None, "nvmlShutdown": None, **SOUND}

    def answer(name: str, *arguments: Any) -> Any:
        said = answers.get(name, NOT_SUPPORTED)
        if isinstance(said, Exception):
            raise said
        return said[arguments[-1]] if isinstance(said, dict) else said

    def handle(uuid: str) -> str:
        if uuid != "GPU-1":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", handle)
    for name in (*answers, "nvmlDeviceGetRetiredPages", "nvmlDeviceGetRetiredPagesPendingStatus"):
        monkeypatch.setattr(pynvml, name, lambda *given, name=name: answer(name, *given))
    return answers


def test_a_sound_gpu(nvml: dict[str, Any]) -> None:
    health = read_health("GPU-1")
    assert list(health.complaints()) == [], "at its power limit is where a busy GPU is"
    assert health.describe() == (
        "driver 580.65; 56 °C, clocks held back by nothing; uncorrected memory errors 0 since the driver was "
        "loaded, 4 ever; rows remapped 3"
    )


@pytest.mark.parametrize(
    ("answers", "complaints"),
    [
        (
            {"nvmlDeviceGetRemappedRows": (0, 1, 1, 0)},
            [("memory repairs wait for a reset (nvidia-smi --gpu-reset)", True)],
        ),
        (
            {"nvmlDeviceGetRemappedRows": (0, 8, 1, 1)},
            [("memory rows could not be remapped: the GPU has to be replaced", True)],
        ),
        (
            {"nvmlDeviceGetTotalEccErrors": {pynvml.NVML_VOLATILE_ECC: 2, pynvml.NVML_AGGREGATE_ECC: 2}},
            [("2 uncorrected memory errors since the driver was loaded", False)],
        ),
        (
            {"nvmlDeviceGetCurrentClocksEventReasons": 0x8 | 0x40 | 0x4, "nvmlDeviceGetTemperature": 91},
            [("clocks are held back at 91 °C: hardware slowdown, hardware thermal slowdown", False)],
        ),
        (
            {
                "nvmlDeviceGetRemappedRows": NOT_SUPPORTED,
                "nvmlDeviceGetRetiredPages": [4096],
                "nvmlDeviceGetRetiredPagesPendingStatus": 1,
            },
            [("memory repairs wait for a reset (nvidia-smi --gpu-reset)", True)],
        ),
    ],
)
def test_what_is_wrong_is_said(
    nvml: dict[str, Any], answers: dict[str, Any], complaints: list[tuple[str, bool]]
) -> None:
    nvml.update(answers)
    assert list(read_health("GPU-1").complaints()) == complaints


def test_a_gpu_that_counts_nothing_is_not_called_sound(nvml: dict[str, Any]) -> None:
    nvml.update(dict.fromkeys(SOUND, NOT_SUPPORTED), nvmlSystemGetDriverVersion="470")
    health = read_health("GPU-1")
    assert list(health.complaints()) == []
    assert health.describe().count("(not available)") == 5


def test_a_gpu_at_work_is_asked_by_its_uuid(nvml: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of NVML and of CUDA differ once CUDA_VISIBLE_DEVICES is set."""
    gpu, asked = torch.device("cuda", 0), []
    monkeypatch.setattr(doctor, "_multiply", asked.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1"))
    assert isinstance(doctor.examine_gpu(gpu), GpuHealth)
    assert set(asked) == {gpu}
    nvml["nvmlInit"] = pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    missing = doctor.describe_health(doctor.examine_gpu(gpu))
    assert missing == "GPU health: not available (NVML Shared Library Not Found)"
    assert doctor.describe_health(doctor.examine_gpu(CPU)) == "GPU health: not available (no GPU)"


def test_findings_name_node_and_gpu(nvml: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100 * gib, 140 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: gib)
    monkeypatch.setattr(doctor, "_multiplies_rightly", lambda device: device.index != 3)
    nvml["nvmlDeviceGetRemappedRows"] = (0, 1, 1, 0)
    found = doctor.check_device(torch.device("cuda", 3), read_health("GPU-1"))
    assert [str(finding) for finding in found] == [
        "BAD NODE node7: cuda:3 has 39.0 of 140.0 GiB in use by others",
        "BAD NODE node7: cuda:3 multiplies small whole numbers wrongly",
        "BAD NODE node7: cuda:3: memory repairs wait for a reset (nvidia-smi --gpu-reset)",
    ]


def test_kernels_follow_the_configuration() -> None:
    shown = describe_kernels(RunConfig(), CPU)
    assert shown == (
        "fp32, layers not compiled; attention: sdpa (flash where causality is the only mask, else flash); "
        "adamw, ZeRO 1"
    )
    overrides = ["training.compile=true", "training.cuda_graphs=true", "training.precision=bf16"]
    on_gpu = describe_kernels(load_config(None, overrides), torch.device("cuda"))
    assert "bf16, layers compiled, in CUDA graphs; attention: flex; adamw (fused)" in on_gpu


def test_arithmetic_is_tried() -> None:
    assert doctor._multiplies_rightly(CPU)


def test_one_process_alone() -> None:
    """As a person calls it on a laptop."""
    shown = run_command("tools/doctor.py")
    assert re.search(r"^libraries: python .*, torch .*, deepspeed .*, gloo", shown, re.MULTILINE), shown
    assert re.search(r"^matrix products: [\d.]+ to [\d.]+ TFLOP/s$", shown, re.MULTILINE), shown
    assert shown.splitlines()[-1] == "doctor: 1 processes are fit to train"
