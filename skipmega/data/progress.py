"""Progress of a long job: a bar on a terminal, a line every some seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows how much of a corpus is done, the speed in MB a second, and the time left.

    Args:
        name: what is being done.
        total_bytes: size of the job, in bytes on disk.
        stream: where to write; stderr if left out.
        interval: seconds between lines where ``stream`` is no terminal.
        of: what the speed is of.
    """

    def __init__(
        self,
        name: str,
        total_bytes: int,
        *,
        stream: TextIO | None = None,
        interval: float = _SECONDS_BETWEEN_LINES,
        of: str = "text",
    ) -> None:
        self._name = name
        self._of = of
        self._total = total_bytes
        self._stream = stream if stream is not None else sys.stderr
        self._interval = interval
        self._start = self._last_line = time.monotonic()
        self._bar = (
            tqdm(total=total_bytes, desc=name, unit="B", unit_scale=True, file=self._stream)
            if self._stream.isatty()
            else None
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done_bytes: int, text_bytes: int, documents: int) -> None:
        """Report the state: bytes on disk consumed, and bytes (of text) and documents finished, so far."""
        now = time.monotonic()
        speed = text_bytes / max(now - self._start, 1e-9) / 1e6
        if self._bar is not None:
            self._bar.set_postfix_str(f"{documents} documents, {speed:.1f} MB/s of {self._of}", refresh=False)
            self._bar.update(done_bytes - self._bar.n)
        elif now - self._last_line >= self._interval:
            self._last_line = now
            left = (now - self._start) * (self._total - done_bytes) / max(done_bytes, 1)
            print(
                f"{self._name}: {100 * done_bytes / self._total:.0f}%, {documents} documents, "
                f"{speed:.1f} MB/s of {self._of}, {left:.0f} s left",
                file=self._stream,
                flush=True,
            )
