"""Code that comes with exported models, imported from a folder of the tests."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_PACKAGE = "transformers_modules"


@contextmanager
def remote_code_in(cache: Path) -> Iterator[None]:
    """Remote code is copied to, and imported from, ``cache``; nothing reaches for the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
        patch.syspath_prepend(str(cache))
        _forget()
        yield
        _forget()


def _forget() -> None:
    """The package that transformers makes looks for its parts where it was first imported from."""
    for name in [name for name in sys.modules if name.split(".")[0] == _PACKAGE]:
        del sys.modules[name]
