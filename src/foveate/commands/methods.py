"""`foveate methods`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from rich.console import Console
from rich.text import Text

from foveate.asking.mistake import Mistake
from foveate.commands.completion import complete_methods
from foveate.commands.display import listing
from foveate.commands.parameters import Json
from foveate.methods.places import PLACES

if TYPE_CHECKING:
    from foveate.methods.base import Method

DOCS = "docs/methods"


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="One of them, in full.", show_default=False, autocompletion=complete_methods
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the pruning methods, where they act and where they come from; or say all about one.

    foveate methods plphp
    """
    import foveate

    if name is not None:
        try:
            cls = foveate.method_class(name)
        except ValueError as error:
            raise Mistake(str(error)) from error
        if as_json:
            typer.echo(json.dumps(_row(cls), indent=2))
        else:
            _print_one(cls)
        return
    classes = [foveate.method_class(each) for each in foveate.methods()]
    if as_json:
        typer.echo(json.dumps([_row(cls) for cls in classes], indent=2))
        return
    table = listing()
    for cls in classes:
        own = ", ".join(f"{f.name}={_default(f)}" for f in dataclasses.fields(cls))
        place = PLACES[cls.place]
        # Most summaries say the place themselves.
        said = [] if place in cls.summary else [place]
        more = "\n" + "; ".join([*said, own, cls.source])
        table.add_row(cls.name, Text.assemble(cls.summary, (more, "dim")))
    console = Console()
    console.print(table)
    console.print(Text("foveate methods NAME says what each option means", style="dim"))


def _row(cls: type[Method]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {
        "name": cls.name,
        "place": cls.place,
        "summary": cls.summary,
        "source": cls.source,
        "options": {f.name: _default(f) for f in dataclasses.fields(cls)},
        "types": {f.name: _type(hints[f.name]) for f in dataclasses.fields(cls)},
        "choices": {f.name: list(found) for f in dataclasses.fields(cls) if (found := _choices(hints[f.name]))},
        "families": _families(cls),
    }


def _print_one(cls: type[Method]) -> None:
    row, console = _row(cls), Console()
    meanings = _meanings(cls)
    console.print(
        Text(cls.name, style="bold"), Text(f"{cls.summary}\nacts {PLACES[cls.place]}; {cls.source}"), sep="\n"
    )
    fits = row["families"]
    console.print(Text(f"fits {len(fits)} families: {', '.join(fits)}", style="dim"), "")
    table = listing()
    for field in dataclasses.fields(cls):
        choices = row["choices"].get(field.name)
        kind = " | ".join(map(str, choices)) if choices else row["types"][field.name]
        head = f"{field.name}={_default(field)}"
        table.add_row(head, Text.assemble((kind, "dim"), "\n", meanings.get(field.name, "")))
    console.print(table)
    own = cls.__module__.partition(".")[0] == "foveate"
    more = f"{DOCS}/{cls.name}.md" if own else f"the package {cls.__module__.partition('.')[0]}, which brings it"
    console.print(Text(f"-m {cls.name}:OPTION=VALUE,... sets them; more in {more}", style="dim"))


def _families(cls: type[Method]) -> list[str]:
    import foveate
    from foveate.engine.support import fitting

    known = {name: foveate.get_family(name) for name in foveate.families()}
    return [name for name, family in known.items() if family is not None and cls.name in fitting(family)]


def _meanings(cls: type[Method]) -> dict[str, str]:
    """What the docstrings of a class and of those it stands on say of each option, ranges included."""
    names = [field.name for field in dataclasses.fields(cls)]
    found: dict[str, str] = {}
    for base in cls.__mro__:
        text = inspect.getdoc(base) if base.__doc__ else None
        for part in re.split(r"\n\s*\n", text or ""):
            # A sentence that begins with names and a colon speaks of these, up to the next such.
            heads = list(re.finditer(r"(?:(?<=^)|(?<=\n)|(?<=\. ))((?:\w+, )*\w+): ", part))
            heads = [head for head in heads if all(name in names for name in head[1].split(", "))]
            ends = [*(head.start() for head in heads[1:]), len(part)]
            for head, end in zip(heads, ends, strict=False):
                said = part[head.end() : end]
                for name in head[1].split(", "):
                    found.setdefault(name, " ".join(said.split()))
    return found


def _default(option: dataclasses.Field[Any]) -> Any:
    return None if option.default is dataclasses.MISSING else option.default


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _type(hint: Any) -> str:
    """A type as one reads it."""
    if get_origin(hint) is Literal:
        return "choice"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
