"""Tables that fit: columns are left out where a terminal is narrow, and nothing where none is."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

UNLIMITED_COLUMNS = 10_000
"""A file or a pipe has no width: what is read by programs is never cut."""
GAP = 2


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    is_number: bool = False
    dispensable: int = 0
    """Columns with the highest number go first where a table is too wide; 0 always stays."""
    shorten: Callable[[str, int], str] | None = None
    """Gives a cell in at most so many characters; only one column of a table has it."""
    least: int = 0
    """Characters that `shorten` can do with."""


def plain_console(stream: TextIO | None = None) -> Console:
    """A console on a stream (stdout), as wide as its terminal and unlimited without one."""
    console = Console(file=stream or sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, highlight=False, width=UNLIMITED_COLUMNS)
    return console


def fitted(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> Table:
    """A table of at most `width` characters where its indispensable columns allow; no row wraps."""
    widths = [
        max(cell_len(cell) for cell in (column.name, *(row[i] for row in rows)))
        for i, column in enumerate(columns)
    ]
    kept = choose(columns, widths, width)
    room = width - needed(columns, widths, kept, least=True)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for i in kept:
        side = "right" if columns[i].is_number else "left"
        table.add_column(columns[i].name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(cell(columns[i], row[i], room)) for i in kept))
    return table


def choose(columns: Sequence[Column], widths: Sequence[int], width: int) -> list[int]:
    """Indices of the columns to show: the most dispensable ones go until the rest fits."""
    kept = list(range(len(columns)))
    while needed(columns, widths, kept, least=True) > width:
        first_to_go = max(kept, key=lambda i: columns[i].dispensable)
        if columns[first_to_go].dispensable == 0:
            break
        kept.remove(first_to_go)
    return kept


def needed(
    columns: Sequence[Column], widths: Sequence[int], kept: Sequence[int], *, least: bool
) -> int:
    """Characters of the columns and the gaps between them."""
    cells = (
        min(widths[i], columns[i].least) if least and columns[i].shorten else widths[i]
        for i in kept
    )
    return sum(cells) + GAP * (len(kept) - 1)


def cell(column: Column, text: str, room: int) -> str:
    """The cell, shortened where its column can be, with the room that is left to share."""
    if column.shorten is None:
        return text
    return column.shorten(text, column.least + max(0, room))
