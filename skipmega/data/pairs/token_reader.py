"""Reads tokens from ``.bin`` files so that a failing disk is an error, and one that passes is waited for.

A memory map answers an I/O error with SIGBUS, which ends the process, and megatron-core's own reader without
a map takes what a short read leaves unfilled for tokens.
"""

import os
import sys
import time
import weakref
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import _BinReader
from numpy.typing import NDArray

from skipmega.errors import DataFaultError

_FIRST_PAUSE = 1.0  # seconds before a failed read is tried again, doubled each time


class TokenReader(_BinReader):
    """Reads from one ``.bin`` file; usable in processes that were forked after it was used.

    Args:
        path: the file, opened when it is first read.
        retries: times that a failed read is tried again, after 1, 2, 4 ... seconds.
    """

    def __init__(self, path: str, retries: int) -> None:
        self._path, self._retries = path, retries
        self._descriptor: int | None = None

    def read(self, dtype: Any, count: int, offset: int) -> NDArray[Any]:
        """``count`` items of ``dtype`` from byte ``offset`` on, [count].

        Raises:
            DataFaultError: the last try failed too.
        """
        items = np.empty(int(count), dtype)
        for retry in range(self._retries + 1):
            try:
                self._fill(items.view(np.uint8).data, int(offset))
                return items
            except OSError as error:
                self._close()
                problem = (
                    f"cannot read {items.nbytes} bytes of {self._path} at {offset}: {error.strerror or error}"
                )
            if retry < self._retries:
                pause = _FIRST_PAUSE * 2**retry
                print(f"warning: {problem}; trying again in {pause:.0f} s", file=sys.stderr, flush=True)
                time.sleep(pause)
        raise DataFaultError(f"{problem}, also after {self._retries} more tries (data.read_retries)")

    def _fill(self, buffer: memoryview, offset: int) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDONLY)
            self._closing = weakref.finalize(self, os.close, self._descriptor)
        while buffer:
            read = os.preadv(self._descriptor, [buffer], offset)
            if read == 0:
                raise OSError(f"the file ends at {os.fstat(self._descriptor).st_size}")
            buffer, offset = buffer[read:], offset + read

    def _close(self) -> None:
        """The next try opens the file anew: a network file system may have lost its handle."""
        if self._descriptor is not None:
            self._closing()
            self._descriptor = None


def read_with_retries(dataset: Any, retries: int) -> None:
    """Give a :class:`TokenReader` to every indexed dataset below megatron-core's ``dataset``."""
    for part in getattr(dataset, "datasets", [dataset]):
        part.dataset.bin_reader = TokenReader(f"{part.dataset_path}.bin", retries)
