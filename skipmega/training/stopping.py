"""Requests to save and leave: signals, a file, a longest duration."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType

from skipmega import exit_codes

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_END = 0  # no signal has this number


class Request(IntEnum):
    """Why to stop, in an order that lets processes agree on the greatest."""

    NONE = 0
    FILE = 1
    DURATION = 2
    SIGUSR2 = 3
    SIGUSR1 = 4
    SIGTERM = 5

    def describe(self) -> str:
        """Words for it."""
        return {Request.FILE: "a stop file", Request.DURATION: "training.max_duration"}.get(self, self.name)


class StopRequests:
    """What this process was asked, from :meth:`listen` to :meth:`ignore`.

    As long as there is nothing to save (libraries, process groups, sample indices and models are made), a
    signal ends the process at once, whatever its main thread waits for; once :meth:`training_begins`, it is
    noted for whoever asks.

    Args:
        stop_file: its presence is a request; None to look for none (one process of a job is enough).
        max_minutes: after these many from now on there is a request; None for never.
    """

    def __init__(self, stop_file: Path | None, max_minutes: float | None) -> None:
        self._stop_file = stop_file
        self._end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signalled = Request.NONE
        self._trains = False
        self._before: dict[signal.Signals, object] = {}
        self._wake = (-1, -1)

    def listen(self) -> None:
        """Take the signals over; only in the main thread."""
        self._wake = os.pipe()
        os.set_blocking(self._wake[1], False)
        signal.set_wakeup_fd(self._wake[1])
        self._before = {number: signal.signal(number, _do_nothing) for number in _SIGNALS}
        os.register_at_fork(after_in_child=self._leave_to_parent)
        # Python runs handlers between two instructions of the main thread, which may wait in a collective
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def training_begins(self) -> None:
        """From now on there is something to save."""
        self._trains = True

    def now(self) -> Request:
        """The most urgent request so far."""
        if self._signalled is not Request.NONE:
            return self._signalled
        if self._end is not None and time.monotonic() > self._end:
            return Request.DURATION
        if self._stop_file is not None and self._stop_file.exists():
            return Request.FILE
        return Request.NONE

    def heeded(self) -> None:
        """Take the stop file away: the run stops once for it."""
        if self._stop_file is not None:
            with suppress(OSError):
                self._stop_file.unlink(missing_ok=True)

    def ignore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
        signal.set_wakeup_fd(-1)
        os.write(self._wake[1], bytes([_END]))

    def _leave_to_parent(self) -> None:
        """In a process that reads ahead: a signal to the whole job must not end it before the run is saved.
        Its parent, when it ends, sends SIGTERM twice."""
        if self._before:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, _ignore_once)

    def _watch(self) -> None:
        with os.fdopen(self._wake[0], "rb", buffering=0) as pipe:
            while (number := pipe.read(1)[0]) != _END:
                if number not in _SIGNALS:
                    continue
                name = signal.Signals(number).name
                if not self._trains:
                    print(
                        f"stopped: {name} before the first step, nothing to save", file=sys.stderr, flush=True
                    )
                    exit_codes.leave_note(exit_codes.REQUEUE)
                    os._exit(exit_codes.REQUEUE)
                self._signalled = max(self._signalled, Request[name])
        os.close(self._wake[1])


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """The byte in the pipe is enough; a handler keeps the signal from ending the process."""


def _ignore_once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
