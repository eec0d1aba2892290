"""How long a stage's forward passes take: what an uneven cut into pipeline stages shows in."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ForwardClock:
    """Time of some passes on a device; a GPU's is read from its own events, without waiting for each."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Count what runs inside as one pass."""
        if not self._on_gpu:
            begin = time.perf_counter()
            yield
            self._seconds.append(time.perf_counter() - begin)
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    def mean(self) -> float:
        """Seconds of a pass, 0 if there was none; waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += [first.elapsed_time(last) / 1000 for first, last in self._events]
            self._events = []
        return sum(self._seconds) / max(len(self._seconds), 1)
