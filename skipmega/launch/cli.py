"""What every script in ``tools/`` and ``pretrain/`` shares: errors as sentences, and quiet libraries."""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from skipmega.errors import SkipmegaError

USER_ERROR_EXIT = 2


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` and exit 0; what the user can mend is printed as one message and exits 2.

    That is every :class:`SkipmegaError`, and what the operating system refuses (a full disk, say).
    """
    quiet_libraries()
    try:
        main()
    except SkipmegaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_EXIT)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_EXIT)
    sys.exit(0)


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
