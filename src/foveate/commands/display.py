"""What several commands show on the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from foveate.asking.notes import moving


def status(doing: str) -> Any:
    """A spinner on stderr while something takes its time."""
    return moving().status(doing)


def listing() -> Table:
    """An empty table of names and what is said of each."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 1, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table
