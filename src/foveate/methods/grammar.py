"""Methods as they are written, on the command line, in files and in Python alike.

    fopru                                   a method
    plphp:delta=0.2,layers=8:16:24          with options
    divprune:keep=0.5+csp:keep=0.4          several that act together
    fopru,plphp:delta=0.2,alpha=1,a+b       a list of those

The names of methods are found without regard to case, `-` and `_`; an option's `-` is a `_`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .method import Method

HOW = "write names, and options behind a colon: fopru,plphp:delta=0.2,alpha=1; a+b acts together"


@dataclasses.dataclass(frozen=True)
class Part:
    """One method as it was written: the name it is known by, and its options by name."""

    name: str
    options: dict[str, Any]

    def __str__(self) -> str:
        """The same as text, which `parse_methods` reads."""
        options = ",".join(f"{option}={_written(value)}" for option, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name


Parts = tuple[Part, ...]


def typed(text: str) -> Any:
    """The value that `text` writes: an int, a finite float, several of them (`8:16:24`), a bool, None, or the text.

    Raises:
        ValueError: for a number that is not finite.
    """
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    if ":" in text:
        numbers = tuple(map(typed, text.split(":")))
        return text if any(isinstance(number, str) for number in numbers) else numbers
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number: give one, such as 0.25")
    return number


def parse_methods(text: str) -> list[Parts]:
    """A list of methods, each alone or several that act together.

    Raises:
        ValueError: where it is written otherwise, or an option is given twice. Names are not looked up.
    """
    written: list[list[Part]] = []
    for piece in text.split(","):
        # `+` joins methods where a name follows; within a value, such as 1e+3 or a path, it is a character.
        first, *joined = re.split(r"\+(?=\s*[^\W\d][\w-]*\s*(?:[:+]|$))", piece)
        name, colon, pair = first.strip().partition(":")
        if "=" in name:  # one more option of the method before it
            name, colon, pair = "", "", first.strip()
        if name:
            written.append([_part(text, name, colon, pair)])
        elif not written:
            raise ValueError(HOW)
        else:
            _add(written[-1][-1], *_option(text, pair))
        for each in joined:
            written[-1].append(_part(text, *each.strip().partition(":")))
    return [tuple(parts) for parts in written]


def parse_method(text: str) -> Parts:
    """One method, or several that act together.

    Raises:
        ValueError: where it is none, or a list.
    """
    found = parse_methods(text)
    if len(found) != 1:
        raise ValueError(f"{text}: one method is wanted here, or several that act together, written a+b")
    return found[0]


def label(parts: Sequence[Part]) -> str:
    """Methods and their options as one word: what `parse_methods` reads."""
    return "+".join(map(str, parts))


def build(part: Part, **more: Any) -> Method:
    """The method object. more: further options.

    Raises:
        ValueError: as `get_method`, and for an option that is written and given.
    """
    from . import get_method

    if twice := sorted(set(more) & set(part.options)):
        raise ValueError(f"{', '.join(twice)}: {part} says it already; give it once")
    return get_method(part.name, **part.options, **more)


def shared(parts: Sequence[Part], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each part what it is to be built with: what was written, and those of the options that it has.

    Raises:
        ValueError: for an unknown name, an option that no part has, or one that all who have it say themselves.
    """
    from . import method_class, option_names

    # Where they have no such option, methods whose scores add up take a mass.
    fields = [[*option_names(method_class(part.name)), "mass"] for part in parts]
    for option in options:
        having = [part for part, own in zip(parts, fields, strict=True) if option in own]
        if not having:
            known = {part.name: ", ".join(own[:-1]) for part, own in zip(parts, fields, strict=True)}
            raise ValueError(f"no option {option!r}: " + "; ".join(f"{name} has {own}" for name, own in known.items()))
        if all(option in part.options for part in having):
            raise ValueError(f"{option}: {label(having)} says it already; give it once")
    return [
        {**{name: value for name, value in options.items() if name in own}, **part.options}
        for part, own in zip(parts, fields, strict=True)
    ]


def _part(text: str, name: str, colon: str, pair: str) -> Part:
    from . import known_as

    name = name.strip()
    if not re.fullmatch(r"[\w.-]+", name) or (colon and not pair.strip()):
        raise ValueError(HOW)
    part = Part(known_as(name) or name, {})
    if colon:
        _add(part, *_option(text, pair))
    return part


def _option(text: str, pair: str) -> tuple[str, Any]:
    option, equals, value = pair.partition("=")
    option, value = option.strip().replace("-", "_"), value.strip()
    if not option or not equals or not value:
        raise ValueError(HOW)
    return option, typed(value)


def _add(part: Part, option: str, value: Any) -> None:
    if option in part.options:
        raise ValueError(f"{part.name} is given {option} twice: give it once")
    part.options[option] = value


def _written(value: Any) -> str:
    """An option's value as `typed` reads it."""
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
