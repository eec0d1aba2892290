"""What a GPU says of itself through NVML: memory errors, repairs that wait, what slows it down."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import pynvml

T = TypeVar("T")
# reasons for lower clocks that are nobody's wish, by their bit
_SLOWDOWNS = {
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hardware thermal slowdown",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "software thermal slowdown",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
}


@dataclass(frozen=True)
class GpuHealth:
    """One GPU; None where it does not count such a thing.

    ``errors`` are uncorrected memory errors since the driver was loaded, ``errors_ever`` over its life;
    ``remapped`` the rows of memory replaced by spares (retired pages of GPUs before Ampere). Such a repair
    is ``pending`` until the GPU is reset, or has ``failed``. ``slowdowns``: what holds clocks back now.
    """

    driver: str
    celsius: int | None
    errors: int | None
    errors_ever: int | None
    remapped: int | None
    pending: bool | None
    failed: bool | None
    slowdowns: tuple[str, ...] | None

    def describe(self) -> str:
        """One line; what is not counted is said to be so."""
        held = None if self.slowdowns is None else ", ".join(self.slowdowns) or "nothing"
        errors = f"{_said(self.errors)} since the driver was loaded, {_said(self.errors_ever)} ever"
        return (
            f"driver {self.driver}; {_said(self.celsius)} °C, clocks held back by {_said(held)}; uncorrected "
            f"memory errors {errors}; rows remapped {_said(self.remapped)}"
        )

    def complaints(self) -> Iterator[tuple[str, bool]]:
        """What is wrong, and whether it forbids to train there."""
        if self.failed:
            yield "memory rows could not be remapped: the GPU has to be replaced", True
        elif self.pending:
            yield "memory repairs wait for a reset (nvidia-smi --gpu-reset)", True
        if self.errors:
            yield f"{self.errors} uncorrected memory errors since the driver was loaded", False
        if self.slowdowns:
            at = "" if self.celsius is None else f" at {self.celsius} °C"
            yield f"clocks are held back{at}: {', '.join(self.slowdowns)}", False


def read_health(uuid: str) -> GpuHealth:
    """Ask NVML about the GPU of this UUID (``GPU-...``).

    Raises:
        pynvml.NVMLError: there is no NVML, or it does not know the GPU (a slice of one, say).
    """
    pynvml.nvmlInit()
    try:
        gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        rows = _ask(lambda: pynvml.nvmlDeviceGetRemappedRows(gpu))
        corrected, uncorrected, pending, failed = rows or (0, *_retired_pages(gpu), None)
        return GpuHealth(
            driver=pynvml.nvmlSystemGetDriverVersion(),
            celsius=_ask(lambda: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)),
            errors=_errors(gpu, pynvml.NVML_VOLATILE_ECC),
            errors_ever=_errors(gpu, pynvml.NVML_AGGREGATE_ECC),
            remapped=None if uncorrected is None else corrected + uncorrected,
            pending=None if pending is None else bool(pending),
            failed=None if failed is None else bool(failed),
            slowdowns=_slowdowns(_ask(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu))),
        )
    finally:
        pynvml.nvmlShutdown()


def _errors(gpu: object, since: int) -> int | None:
    kind = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    return _ask(lambda: pynvml.nvmlDeviceGetTotalEccErrors(gpu, kind, since))


def _retired_pages(gpu: object) -> tuple[int | None, int | None]:
    """Number, and whether more wait for a reset: how GPUs without spare rows repair their memory."""
    cause = pynvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR
    pages = _ask(lambda: pynvml.nvmlDeviceGetRetiredPages(gpu, cause))
    pending = _ask(lambda: pynvml.nvmlDeviceGetRetiredPagesPendingStatus(gpu))
    return None if pages is None else len(pages), pending


def _slowdowns(reasons: int | None) -> tuple[str, ...] | None:
    return None if reasons is None else tuple(name for bit, name in _SLOWDOWNS.items() if reasons & bit)


def _ask(question: Callable[[], T]) -> T | None:
    """The answer; None if this GPU or driver has none."""
    try:
        return question()
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NoPermission):
        return None


def _said(count: object) -> object:
    return "(not available)" if count is None else count
