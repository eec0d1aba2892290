"""Parts that are run again in backward, in place of keeping what they need."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def run_again(part: Callable[..., Result], *arguments: Any, when: bool = True) -> Result:
    """``part(*arguments)``; ``when`` set, its arguments are all that it keeps. Nothing in it may be random.

    In a compiled layer its results are made anew too: the compiler lets nothing of such a part be kept, the
    input of a matrix product that follows included.
    """
    if not when:
        return part(*arguments)
    result: Result = checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result
