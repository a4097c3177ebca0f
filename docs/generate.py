"""Writes docs/methods.md, the stub of the package, and the tables in README.md, training/README.md and pages of docs.

Facts (place, options, source) come from the code, prose from docs/methods/NAME.md. Tables stand between
`<!-- family names -->`, `<!-- families -->`, `<!-- videos -->`, or `<!-- foveate table ... -->` with any of that
command's options, and `<!-- end -->`.

python docs/generate.py
"""

import contextlib
import dataclasses
import inspect
import io
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from typer.main import get_command

import foveate
from foveate.commands.app import app
from foveate.engine.support import fitting_in_words
from foveate.families import family_names, get_family
from foveate.methods import built_in_classes, method_class, method_names
from foveate.methods.base import Method
from foveate.methods.places import PLACES

HERE = Path(__file__).parent
STUB = HERE.parent / "src" / "foveate" / "__init__.pyi"
WITH_TABLES = ("results", "families", "measuring", "calibrate", "serving", "video", "compared")
PAGES = (
    HERE.parent / "README.md",
    *(HERE / f"{name}.md" for name in WITH_TABLES),
    HERE.parent / "training" / "README.md",
)


def meanings(cls: type[Method]) -> dict[str, str]:
    """What the docstring says of each option: paragraphs that begin with `name:` or `name, name:`."""
    found: dict[str, str] = {}
    options = {field.name for field in dataclasses.fields(cls)}
    at: list[str] = []
    for line in inspect.getdoc(cls).splitlines():  # type: ignore[union-attr]
        head = re.match(r"([\w, ]+): (.*)", line)
        names = head[1].split(", ") if head else []
        if head and options.issuperset(names):
            at, line = names, head[2]
        elif not line.startswith("    "):
            at = []
        for name in at:
            found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return found


def default(field: "dataclasses.Field[Any]") -> str:
    """An option's default as code."""
    return "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"


def section(name: str) -> str:
    """One method: heading, summary, options and source from the code around its prose."""
    cls = method_class(name)
    options: dict[str, list[dataclasses.Field[Any]]] = {}
    about = meanings(cls)
    for field in dataclasses.fields(cls):
        options.setdefault(about[field.name], []).append(field)
    rows = [
        f"| {', '.join(f'`{f.name}`' for f in fields)} | {default(fields[0])} | {text} |"
        for text, fields in options.items()
    ]
    prose = (HERE / "methods" / f"{name}.md").read_text().strip()
    return "\n".join(
        [
            f"### `{name}`",
            "",
            f"`foveate.{cls.__name__}`: {cls.summary}.",
            "",
            prose,
            "",
            "| option | default | meaning |",
            "|---|---|---|",
            *rows,
            "",
            f"Source: {cls.source}.",
            "",
        ]
    )


def page() -> str:
    """The whole of docs/methods.md."""
    by_place = {place: [n for n in method_names() if method_class(n).place == place] for place in PLACES}
    lists = {f"METHODS_{place.upper()}": ", ".join(f"`{n}`" for n in names) for place, names in by_place.items()}
    parts = [(HERE / "methods" / "_overview.md").read_text().format(TABLE=methods_table(), **lists)]
    for place, title in PLACES.items():
        parts += [f"## {title[0].upper() + title[1:]}\n", *map(section, by_place[place])]
    parts.append((HERE / "methods" / "_adding.md").read_text())
    return "\n".join(parts)


def methods_table() -> str:
    """All methods in short, place by place."""
    rows = ["| name | drops tokens | what it does | default | source |", "|---|---|---|---|---|"]
    for place, title in PLACES.items():
        for name in method_names():
            cls = method_class(name)
            if cls.place == place:
                keep = default(next(f for f in dataclasses.fields(cls) if f.name == "keep")).strip("`")
                what = re.sub(r",? (before|inside) the LLM$", "", cls.summary)  # said in the column before
                source = re.sub(r".*?(\d{4}\.\d{5}).*", r"[\1](https://arxiv.org/abs/\1)", cls.source)
                rows.append(f"| `{name}` | {title} | {what} | `keep={keep}` | {source} |")
    return "\n".join(rows)


def families_table() -> str:
    """All families: models of each, and the methods that fit its places."""
    rows = ["| `model_type` | models, for example | methods |", "|---|---|---|"]
    for model_type in family_names():
        family = get_family(model_type)
        assert family is not None
        rows.append(f"| `{model_type}` | {', '.join(family.examples)} | {fitting_in_words(family, '`')} |")
    return "\n".join(rows)


def family_names_list() -> str:
    """The names of all families."""
    return ", ".join(f"`{name}`" for name in family_names())


def videos_table() -> str:
    """The families whose models take videos that can be pruned, and models of each."""
    from transformers import CONFIG_MAPPING

    rows = ["| `model_type` | models, for example |", "|---|---|"]
    for model_type in family_names():
        family = get_family(model_type)
        assert family is not None
        # Some configurations name no placeholder unless a checkpoint does.
        if (
            model_type in CONFIG_MAPPING
            and family.video_token_id(CONFIG_MAPPING[model_type](video_token_id=0)) is not None
        ):
            rows.append(f"| `{model_type}` | {', '.join(family.examples)} |")
    return "\n".join(rows)


def ordered(names: Iterable[str]) -> list[str]:
    """As ruff orders names: constants, classes, functions."""
    return sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def stub() -> str:
    """The whole of src/foveate/__init__.pyi: what type checkers cannot see of a module that asks a registry."""
    modules: dict[str, list[str]] = {}
    for cls in built_in_classes().values():
        modules.setdefault(cls.__module__.removeprefix("foveate."), []).append(cls.__name__)
    imports = {
        "engine": "Pruned, PruneReport, UnsupportedError, prune, restore",
        "methods.base": "Method",
        **{module: ", ".join(ordered(names)) for module, names in modules.items()},
    }
    return "\n".join(
        [
            "# Written by docs/generate.py from the registry. What the package does stands in __init__.py.",
            "",
            f"from .engine import {imports.pop('engine')}",
            "from .families import family_names as families",
            "from .families import get_family",
            "from .methods import get_method, method_class",
            "from .methods import method_names as methods",
            *(f"from .{module} import {names}" for module, names in sorted(imports.items())),
            "",
            "__version__: str",
            "__all__ = [",
            *(f'    "{name}",' for name in ordered(foveate.__all__)),
            "]",
            "",
        ]
    )


def printed(command: str) -> str:
    """What a command of foveate prints in the folder of the repository."""
    out, here = io.StringIO(), Path.cwd()
    os.chdir(HERE.parent)
    try:
        with contextlib.redirect_stdout(out):
            if get_command(app).main(shlex.split(command)[1:], standalone_mode=False):
                raise SystemExit(f"this failed: {command}")
    finally:
        os.chdir(here)
    return out.getvalue()


def renewed(path: Path) -> str:
    """A page with its tables renewed, between two comments each."""

    def block(match: re.Match[str]) -> str:
        tables = {
            "family names": family_names_list,
            "families": families_table,
            "videos": videos_table,
        }
        table = tables[match[1]]() + "\n" if match[1] in tables else printed(match[1])
        return f"<!-- {match[1]} -->\n{table}<!-- end -->"

    blocks = r"<!-- (family names|families|videos|foveate table [^\n]*) -->\n.*?<!-- end -->"
    return re.sub(blocks, block, path.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    (HERE / "methods.md").write_text(page())
    STUB.write_text(stub())
    for path in PAGES:
        path.write_text(renewed(path))
