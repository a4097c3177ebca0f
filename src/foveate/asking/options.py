"""Methods, their options and keeps as they are written on the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from foveate.asking.mistake import Mistake
from foveate.methods.places import PLACES

if TYPE_CHECKING:
    from foveate.methods.base import Method


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method at one `keep`.

    label: the method and its options as written, such as "fopru:strategy=row". named: asked for by name, not by `all`.
    """

    label: str
    keep: float | int
    method: Method
    named: bool = True


def typed(text: str) -> Any:
    """The value that `text` writes: an int, a finite float, several of them (`8:16:24`), a bool, None, or the text."""
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
        raise Mistake(f"{text} is not a finite number: give one, such as 0.25")
    return number


def parse_keeps(text: str) -> list[float | int]:
    """`0.5,64`: fractions of each image's tokens, and tokens per image."""
    from foveate.methods.base import check_keep

    keeps = [typed(part.strip()) for part in text.split(",")]
    for keep in keeps:
        try:
            check_keep(keep)
        except ValueError as error:
            raise Mistake(f"--keep {text}: {error}") from error
    return list({repr(keep): keep for keep in keeps}.values())  # 1 (token) and 1.0 (all tokens) are equal otherwise


def parse_grid(text: str, example: str) -> tuple[float, ...]:
    """`0.5,0.25` as numbers; example: what to write where it is none."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise Mistake(f"--grid {text}: write fractions with commas between them, such as {example}") from None


def parse_methods(text: str) -> list[tuple[str, dict[str, Any]]]:
    """`fopru,plphp:delta=0.2,layers=1:3` as names with options; the word `all` stands for itself."""
    parsed: list[tuple[str, dict[str, Any]]] = []
    for part in text.split(","):
        part = part.strip()
        name, colon, pair = part.partition(":")
        if "=" in name:  # one more option of the method before it
            name, colon, pair = "", "", part
        option, equals, value = pair.partition("=")
        if (pair and not (option and equals and value)) or (colon and not pair) or not (name or parsed):
            raise Mistake(f"--methods {text}: write names, and options behind a colon: fopru,plphp:delta=0.2,alpha=1")
        if name:
            parsed.append((name, {}))
        if pair:
            parsed[-1][1][option.strip().replace("-", "_")] = typed(value.strip())
    return parsed


def label(name: str, options: dict[str, Any]) -> str:
    """A method and its options as one word: what `parse_methods` reads."""
    return name + ":" * bool(options) + ",".join(f"{option}={_written(value)}" for option, value in options.items())


def _written(value: Any) -> str:
    """An option's value as `typed` reads it."""
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)


def natural_method(fits: Sequence[str]) -> str:
    """The method to take where nobody named one, no blind one if there is another. fits: those that fit the model."""
    import foveate

    chosen = [name for name in fits if not foveate.method_class(name).source.startswith("baseline")]
    return "fopru" if "fopru" in fits else [*chosen, *fits][0]


def guide_option(cls: type[Method], options: dict[str, Any], guide: str | None) -> dict[str, Any]:
    """The name of the guide as an option of a method that has one, until `loading.load_guide` loads it.

    options: of the method, as written. guide: None where there is none.

    Raises:
        ValueError: where the guide is missing, or written as an option.
    """
    from foveate.methods.base import GuidedMethod

    if not issubclass(cls, GuidedMethod):
        return {}
    if "guide" in options:
        raise ValueError(f"the guide of {cls.name} is given by --guide, not as an option")
    if guide is None:
        raise ValueError(
            f"the guide of {cls.name} is missing: give a smaller model of the same family by --guide "
            "(foveate ask, check, eval and show have it)"
        )
    return {"guide": guide}


def variants(
    methods: str,
    keeps: Sequence[float | int],
    places: Collection[str],
    model_type: str,
    *,
    always: Sequence[str] = (),
    seed: int | None = None,
    guide: str | None = None,
) -> tuple[list[Variant], list[str]]:
    """Every method at every keep, and a line for each method that had to be left out.

    methods: what `--methods` says; `all` means every method that fits, once for each value of an option that is a
    choice of words. places: where the model's family lets methods act. always: methods that are put first where they
    fit. seed: for methods that draw and were given none. guide: as `guide_option` takes it.

    Raises:
        Mistake: for a named method that is unknown, does not fit, or does not take an option or keep.
    """
    import foveate

    wanted: dict[str, tuple[str, dict[str, Any], bool]] = {}
    for name in always:
        if foveate.method_class(name).place in places:
            wanted[name] = (name, {}, False)
    for name, options in parse_methods(methods):
        if name == "all" and not options:
            for each in foveate.methods():
                for choice in _choices(each):
                    wanted.setdefault(label(each, choice), (each, choice, False))
        else:
            wanted[label(name, options)] = (name, options, True)
    chosen, left_out = [], []
    for text, (name, options, named) in wanted.items():
        try:
            cls = foveate.method_class(name)
            if "keep" in options:
                raise ValueError("what it keeps is said by --keep, for all methods alike")
            if cls.place not in places:
                raise ValueError(f"it drops tokens {PLACES[cls.place]}, which {model_type} models lack")
            drawn: dict[str, Any] = {"seed": seed} if seed is not None and "seed" in cls.__dataclass_fields__ else {}
            drawn |= {**options, **guide_option(cls, options, guide)}
            chosen += [Variant(text, keep, foveate.get_method(name, keep=keep, **drawn), named) for keep in keeps]
        except (ValueError, TypeError) as error:
            line = f"{text}: {' '.join(str(error).split())}"
            if named:
                raise Mistake(line) from error
            left_out.append(line)
    return chosen, left_out


def _choices(name: str) -> Iterator[dict[str, Any]]:
    """The method as it is, and with each other value of an option that is a choice of words (`fopru:strategy=row`)."""
    import foveate

    cls = foveate.method_class(name)
    hints = get_type_hints(cls)
    yield {}
    for option in dataclasses.fields(cls):
        if get_origin(hints[option.name]) is Literal:
            for value in get_args(hints[option.name]):
                if isinstance(value, str) and value != option.default:
                    yield {option.name: value}
