"""What every script in ``tools/`` and ``pretrain/`` shares: errors as sentences, and quiet libraries."""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from skipmega import exit_codes
from skipmega.errors import SkipmegaError


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` and exit with a status of :mod:`skipmega.exit_codes`.

    Every :class:`SkipmegaError` is printed as one message and has a status of its own; what the operating
    system refuses (a full disk, say) is the user's to mend.
    """
    quiet_libraries()
    try:
        main()
    except SkipmegaError as error:
        print(f"{error.label}: {error}", file=sys.stderr, flush=True)
        _leave(error.exit_code)
    except (ConnectionError, TimeoutError):
        raise  # another process is gone: nothing to mend, worth another attempt
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr, flush=True)
        _leave(exit_codes.USER_ERROR)
    _leave(exit_codes.DONE)


def _leave(status: int) -> NoReturn:
    exit_codes.leave_note(status)
    sys.exit(status)


def quiet_libraries() -> None:
    """Leave out what megatron-core, DeepSpeed and torch say at every start and nobody can act on.

    Call it before they are imported. Transformer Engine and Apex are optional; which back-ends are in use
    is printed by the run itself.
    """
    for message in (
        "Transformer Engine and Apex are not installed",
        "Apex is not installed",
        "full scope is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    for name in ("DeepSpeed", "deepspeed"):
        # a filter, since the library sets its own level when it is imported
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
