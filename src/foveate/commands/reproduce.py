"""`foveate reproduce`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from foveate.asking.notes import notes
from foveate.commands.completion import complete_plans
from foveate.commands.display import listing
from foveate.commands.parameters import Device, Json


def reproduce(
    plan: Annotated[
        str | None,
        typer.Argument(
            metavar="[PLAN]",
            help="A TOML file, or a plan that foveate brings; without one they are listed.",
            show_default=False,
            autocompletion=complete_plans,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="ID|FOLDER", help="Instead of the plan's.")] = None,
    data: Annotated[str | None, typer.Option(metavar="FOLDER", help="Questions instead of the plan's.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Where results go; rows in it are kept.", show_default="results/reproduce-PLAN"
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="PART,...", help="eval, bench, tasks.", show_default="all that the plan has"),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Say which commands this stands for, and run none.")] = False,
) -> None:
    """Measure what a plan asks for, accuracy, time and tasks, beside what papers report.

    foveate reproduce glimpse
    """
    if plan is None:
        _list(as_json)
        return
    from foveate.evaluation.plans import open_plan

    chosen = open_plan(plan, model=model, data=data)
    from foveate.evaluation.reproduce import chosen_parts, dry_run, reproduce, rows_there
    from foveate.evaluation.reproduce_report import Summary

    parts = chosen_parts(chosen, only)
    folder = out or Path("results") / f"reproduce-{chosen.name}"
    if dry:
        commands = dry_run(chosen, parts, out=folder, device=device)
        if as_json:
            typer.echo(json.dumps(commands, indent=2))
            return
        for part, lines in commands.items():
            there = rows_there(folder, part)
            typer.echo("\n".join([f"# {part}" + (f", {there} rows are there" if there else ""), *lines]))
        return
    console = notes()
    lost = reproduce(chosen, parts, out=folder, device=device, console=console)
    summary = Summary.of(chosen, folder)
    if as_json:
        typer.echo(summary.to_json())
    elif summary.rows:
        screen = Console()
        screen.print(summary.table().rich(), crop=False)
        for line in summary.notes():
            screen.print(Text(line), soft_wrap=True)
    console.print(Text(f"summary.md and summary.json are in {folder}", style="dim"), soft_wrap=True)
    if lost:
        console.print(Text(f"{len(lost)} rows are missing: see above"), soft_wrap=True)
        raise typer.Exit(1)


def _list(as_json: bool) -> None:
    from foveate.evaluation.plans import open_plan, shipped

    plans = [open_plan(name) for name in shipped()]
    if as_json:
        found = [{"name": each.name, "title": each.title, "model": each.model, "parts": each.parts} for each in plans]
        typer.echo(json.dumps(found, indent=2))
        return
    table = listing()
    for each in plans:
        table.add_row(each.name, Text.assemble(each.title, (f"\n{each.model}: {', '.join(each.parts)}", "dim")))
    console = Console()
    console.print(table)
    console.print(Text("foveate reproduce NAME runs one; --dry-run says what that is", style="dim"))
