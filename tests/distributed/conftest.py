"""Says how many grids were compared, and between how many pairs of them a run was moved."""

from typing import Any

_COUNTED = {
    "equal_one[": "grids equal",
    "resharded[": "pairs of grids equal: saved on one, continued on the other",
}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for test, words in _COUNTED.items():
        equal = [report for report in terminalreporter.getreports("passed") if test in report.nodeid]
        if equal:
            terminalreporter.write_line(f"{len(equal)} {words}")
