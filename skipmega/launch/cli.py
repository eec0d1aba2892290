"""What every script in ``tools/`` and ``pretrain/`` shares: errors as sentences, not tracebacks."""

import sys
from collections.abc import Callable
from typing import NoReturn

from skipmega.errors import SkipmegaError

USER_ERROR_EXIT = 2


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` and exit 0; a :class:`SkipmegaError` is printed as one message and exits 2."""
    try:
        main()
    except SkipmegaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_EXIT)
    sys.exit(0)
