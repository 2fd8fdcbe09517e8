"""Tables: aligned text for a pipe or a file, a drawn one for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from plugframe.errors import printable


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with the given column names; an empty cell is a dash."""
    filled = [[printable(cell, one_line=True) or "-" for cell in row] for row in rows]
    if sys.stdout.isatty():
        _draw(columns, filled)
    else:
        print(plain(columns, filled))


def plain(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table as lines of text, two spaces between columns."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _draw(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    # rich costs as much as the rest of a listing: only a terminal pays for it.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
