"""Writes docs/methods.md: the facts from the code (place, options, source), the prose from docs/methods/NAME.md.

python docs/generate.py
"""

import dataclasses
import inspect
import re
from pathlib import Path

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


def section(name: str) -> str:
    """One method: heading, summary, options and source from the code around its prose."""
    cls = method_class(name)
    about = meanings(cls)
    fields = dataclasses.fields(cls)
    missing = dataclasses.MISSING
    rows = [
        f"| `{field.name}` | {'required' if field.default is missing else f'`{field.default!r}`'} | {about[field.name]} |"
        for field in fields
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


if __name__ == "__main__":
    (HERE / "methods.md").write_text(page())
