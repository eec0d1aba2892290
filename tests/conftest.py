"""Which tests share a process where pytest-xdist runs several (`-n 2 --dist loadgroup`)."""

from pathlib import Path

import pytest

# their tests share a cluster, or runs that take half a minute
_TOGETHER = ("slurm", "integration", "faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of one file, whose fixtures are of a module, or of one of these folders."""
    tests = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(tests)
        group = path.parts[0] if path.parts[0] in _TOGETHER else str(path)
        item.add_marker(pytest.mark.xdist_group(group))
