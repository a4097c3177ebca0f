"""An extension of griffe: what docstrings say of arguments and fields, `name: meaning` line by line, becomes a list."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

NAMED = re.compile(r"(?P<names>\w+(?:, \w+)*): +(?P<text>\S.*)")


def listed(docstring: str) -> str:
    """The docstring with a list in place of each paragraph that begins with a name, or with `Raises:`."""
    return "\n\n".join(_list(paragraph) for paragraph in docstring.split("\n\n"))


def _list(paragraph: str) -> str:
    head, _, rest = paragraph.partition("\n")
    if head == "Raises:":
        return f"Raises:\n\n{_list(rest)}"
    if not NAMED.match(paragraph.strip()):
        return paragraph
    lines = []
    for line in map(str.strip, paragraph.splitlines()):
        found = NAMED.match(line)
        names = ", ".join(f"`{name}`" for name in found["names"].split(", ")) if found else ""
        lines.append(f"- {names}: {found['text']}" if found else f"    {line}")
    return "\n".join(lines)


class Arguments(Extension):
    """Rewrites every docstring."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Once an object has been read."""
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)
