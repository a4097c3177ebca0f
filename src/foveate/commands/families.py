"""`foveate families`."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from foveate.commands.display import listing
from foveate.commands.parameters import Json


def families(as_json: Json = False) -> None:
    """List the model families, the methods that fit each, and models of it."""
    import foveate
    from foveate.engine.support import fitting, fitting_in_words

    rows: list[dict[str, Any]] = []
    words: list[str] = []
    for name in foveate.families():
        family = foveate.get_family(name)
        assert family is not None
        methods = fitting(family)
        examples = list(family.examples)
        rows.append({"model_type": name, "summary": family.summary, "methods": methods, "examples": examples})
        words.append(fitting_in_words(family))
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = listing()
    for row, fit in zip(rows, words, strict=True):
        more = f"\nmethods: {fit}\nsuch as {', '.join(row['examples'])}"
        table.add_row(row["model_type"], Text.assemble(row["summary"], (more, "dim")))
    Console().print(table)
