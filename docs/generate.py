"""Writes docs/methods.md and the table of methods in the README.

Facts (place, options, source) come from the code, prose from docs/methods/NAME.md.

python docs/generate.py
"""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from foveate.methods import method_class, method_names
from foveate.methods.base import Method

HERE = Path(__file__).parent
PLACES = {
    "encoder": "Before the LLM",
    "layer": "Inside the LLM",
    "cache": "In the KV cache",
    "cross": "In cross-attention",
    "logits": "In a second run beside the LLM",
}


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
    parts = [(HERE / "methods" / "_overview.md").read_text().format(**lists)]
    for place, title in PLACES.items():
        parts += [f"## {title}\n", *map(section, by_place[place])]
    parts.append((HERE / "methods" / "_adding.md").read_text())
    return "\n".join(parts)


def readme_table() -> str:
    """All methods in short, place by place."""
    rows = ["| name | drops tokens | what it does | default | source |", "|---|---|---|---|---|"]
    for place, title in PLACES.items():
        for name in method_names():
            cls = method_class(name)
            if cls.place == place:
                keep = default(next(f for f in dataclasses.fields(cls) if f.name == "keep")).strip("`")
                what = re.sub(r",? (before|inside) the LLM$", "", cls.summary)  # said in the column before
                source = re.sub(r".*?(\d{4}\.\d{5}).*", r"[\1](https://arxiv.org/abs/\1)", cls.source)
                rows.append(f"| `{name}` | {title[0].lower() + title[1:]} | {what} | `keep={keep}` | {source} |")
    return "\n".join(rows)


def readme() -> str:
    """README.md with its table of methods renewed, between two comments."""
    text = (HERE.parent / "README.md").read_text()
    before, rest = text.split("<!-- methods -->\n")
    _, after = rest.split("<!-- end -->", 1)
    return f"{before}<!-- methods -->\n{readme_table()}\n<!-- end -->{after}"


if __name__ == "__main__":
    (HERE / "methods.md").write_text(page())
    (HERE.parent / "README.md").write_text(readme())
