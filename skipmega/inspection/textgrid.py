"""Tokens laid out as a page of fixed-width characters."""

from collections.abc import Sequence
from dataclasses import dataclass

TAB_WIDTH = 4
LINE_END = "↵"


@dataclass(frozen=True)
class Cell:
    """One character at (row, column), counted from the top left, and the index of its token."""

    row: int
    column: int
    character: str
    token: int


@dataclass(frozen=True)
class TextGrid:
    """A page of ``num_rows`` x ``columns`` characters; cells without a character are empty."""

    num_rows: int
    columns: int
    cells: list[Cell]


def lay_out(tokens: Sequence[str], columns: int) -> TextGrid:
    """Place the characters of ``tokens`` one after the other, breaking lines after ``columns`` characters
    and after every line end, which is shown as an arrow. A tab is four spaces; other control
    characters are dots."""
    cells: list[Cell] = []
    row = column = 0
    for index, token in enumerate(tokens):
        for character in token.replace("\r\n", "\n").replace("\t", " " * TAB_WIDTH):
            if column == columns:
                row, column = row + 1, 0
            if character == "\n":
                cells.append(Cell(row, column, LINE_END, index))
                row, column = row + 1, 0
            else:
                shown = character if character.isprintable() else "·"
                cells.append(Cell(row, column, shown, index))
                column += 1
    num_rows = max((cell.row for cell in cells), default=0) + 1
    return TextGrid(num_rows, columns, cells)
