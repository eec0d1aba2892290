"""What a training process's exit status says to whoever started it: the contract with schedulers."""

import os
from contextlib import suppress
from pathlib import Path

DONE = 0  # the run reached its end
USER_ERROR = 2  # the message says what to mend; starting again as it is fails again
REQUEUE = 75  # state saved as a limit or a signal asked: start again to continue (EX_TEMPFAIL)
FENCED = 76  # a newer attempt owns the run folder: leave it alone
HUNG = 77  # the watchdog ended it; starting again continues from the last checkpoint
STOPPED_BY_FAULT = 78  # numbers or storage are at fault and repeating has not mended it: a person must look
DRIFTED = 79  # ranks differ in what they must share; starting again continues from the last checkpoint


def leave_note(status: int) -> None:
    """Name a file after ``status`` in the folder that a batch script may give in ``SKIPMEGA_EXIT_DIR``:
    torchrun, for one, hides the statuses of its processes."""
    folder = os.environ.get("SKIPMEGA_EXIT_DIR")
    if folder and status != DONE:
        with suppress(OSError):  # the status itself is still there to be seen
            Path(folder, str(status)).touch()
