"""Finds the rank that holds the others up, and ends a run that makes no progress.

Every process keeps a count of what it has done. A thread writes it to a file of the run folder from time to
time, since a process that is stuck may not be able to say so any more, and watches whether it moves. When it
has not for the limit, the thread writes down where its process is, waits for the others to do the same and
ends the process. One of those that still can names the ranks that have done least.
"""

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from skipmega import exit_codes

_LOOKS = 10  # at the count in the time of the limit
_COMPILATION = 3  # times the limit until the first step is done


@dataclass(frozen=True)
class Heartbeat:
    """What one process has done: ``count`` of all beats, the present ``phase`` of ``step`` (0-based); of one
    that is stuck ``seconds`` since its last beat, and its main thread's ``stack``."""

    rank: int
    count: int
    step: int
    phase: str
    seconds: float | None = None
    stack: str = ""

    def waits_for_others(self) -> bool:
        """Whether the process was inside a collective of torch.distributed."""
        return f"{os.sep}torch{os.sep}distributed{os.sep}" in self.stack

    def describe(self) -> str:
        """A sentence, and the stack if there is one."""
        if self.seconds is None:
            return f"rank {self.rank}, last heard of in step {self.step}, {self.phase}"
        return f"rank {self.rank} in step {self.step}, {self.phase}, for {self.seconds:.0f} s\n{self.stack}"


class Watchdog:
    """Watches this process between ``with`` and its end.

    Args:
        folder: of the heartbeats of this attempt, seen by all processes.
        rank: of this process.
        world_size: number of processes.
        limit: seconds without a beat after which the run is ended; three times as long before the first step
            is done, which may be compiled.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, limit: float) -> None:
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._limit, self._interval = limit, limit / _LOOKS
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._beat = Heartbeat(rank, 0, 0, "before the first step")
        self._at = time.monotonic()
        self._first_step: int | None = None

    def beat(self, step: int, phase: str) -> None:
        """Step ``step`` enters ``phase``."""
        self._at = time.monotonic()
        self._beat = Heartbeat(self._rank, self._beat.count + 1, step, phase)
        if self._first_step is None:
            self._first_step = step

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._at = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            beat, silent = self._beat, time.monotonic() - self._at
            if silent > self._limit * (_COMPILATION if beat.step == (self._first_step or 0) else 1):
                self._end(beat, silent)
            self._publish(beat)

    def _end(self, beat: Heartbeat, silent: float) -> None:
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        self._publish(Heartbeat(beat.rank, beat.count, beat.step, beat.phase, silent, stack))
        time.sleep(4 * self._interval)  # the others notice within one, and read within the next
        beats = self._read_all()
        if self._rank == min(
            (other.rank for other in beats if other.seconds is not None), default=self._rank
        ):
            print(accuse(beats, self._limit), file=sys.stderr, flush=True)
        if self._rank in {laggard.rank for laggard in laggards(beats)}:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        time.sleep(self._interval)  # who is ended by another's end would not have said so
        exit_codes.leave_note(exit_codes.HUNG)
        os._exit(exit_codes.HUNG)

    def _publish(self, beat: Heartbeat) -> None:
        path = self._folder / f"rank-{self._rank}.json"
        partial = path.with_suffix(".partial")
        with suppress(OSError):  # the run does not need it as long as it moves
            partial.write_text(json.dumps(asdict(beat)))
            partial.replace(path)

    def _read_all(self) -> list[Heartbeat]:
        return [self._read(rank) for rank in range(self._world_size)]

    def _read(self, rank: int) -> Heartbeat:
        try:
            return Heartbeat(**json.loads((self._folder / f"rank-{rank}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return Heartbeat(rank, -1, 0, "never heard of")


def laggards(beats: list[Heartbeat]) -> list[Heartbeat]:
    """Those that have done least; among these, the ones that do not wait for others, if there are any."""
    least = min(beat.count for beat in beats)
    last = [beat for beat in beats if beat.count == least]
    return [beat for beat in last if not beat.waits_for_others()] or last


def accuse(beats: list[Heartbeat], limit: float) -> str:
    """Who holds the others up, in which phase, where; and how far the others are."""
    slow = laggards(beats)
    others = [beat for beat in beats if beat not in slow]
    lines = [f"hung: no progress for {limit:.0f} s; held up by", *(beat.describe().rstrip() for beat in slow)]
    if others:
        furthest = max(others, key=lambda beat: beat.count)
        lines.append(f"{len(others)} other ranks wait, the furthest is {furthest.describe().splitlines()[0]}")
    return "\n".join(lines)
