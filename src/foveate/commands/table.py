"""`foveate table`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def table(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Folders that foveate wrote.")],
    columns: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Which columns.", show_default="all that was measured")
    ] = None,
    across: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Spread its values over columns of their own, such as keep.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Only these rows. May be repeated.")
    ] = None,
    sort: Annotated[
        str | None, typer.Option(metavar="[-]COLUMN", help="Order of the rows; -COLUMN: the largest first.")
    ] = None,
    intervals: Annotated[bool, typer.Option("--intervals", help="Show the 95 % intervals.")] = False,
    command: Annotated[bool, typer.Option("--command", help="Name the command that measured it.")] = False,
) -> None:
    """Print results as a Markdown table.

    foveate table results/eval --columns method,accuracy --across keep
    """
    from foveate.evaluation.tables import markdown

    typer.echo(
        markdown(results, columns, across=across, where=where or [], sort=sort, intervals=intervals, command=command)
    )
