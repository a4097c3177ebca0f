"""`foveate methods`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from foveate.commands.display import listing
from foveate.commands.parameters import Json
from foveate.methods.places import PLACES


def methods(as_json: Json = False) -> None:
    """List the pruning methods, where they act and where they come from."""
    import foveate

    classes = {name: foveate.method_class(name) for name in foveate.methods()}
    if as_json:
        rows = [
            {
                "name": name,
                "place": cls.place,
                "summary": cls.summary,
                "source": cls.source,
                "options": {f.name: _default(f) for f in dataclasses.fields(cls)},
            }
            for name, cls in classes.items()
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = listing()
    for name, cls in classes.items():
        own = ", ".join(f"{f.name}={_default(f)}" for f in dataclasses.fields(cls))
        more = f"\n{PLACES[cls.place]}; {own}; {cls.source}"
        table.add_row(name, Text.assemble(cls.summary, (more, "dim")))
    Console().print(table)


def _default(option: dataclasses.Field[Any]) -> Any:
    return None if option.default is dataclasses.MISSING else option.default
