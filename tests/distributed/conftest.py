"""Says how many grids were compared."""

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    equal = [report for report in terminalreporter.getreports("passed") if "equal_one[" in report.nodeid]
    if equal:
        terminalreporter.write_line(f"{len(equal)} grids equal")
