"""Methods, their options and keeps as they are written on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from foveate.asking.mistake import Mistake
from foveate.asking.variant import Variant
from foveate.methods import grammar, option_names
from foveate.methods.grammar import Part, Parts, label
from foveate.methods.places import PLACES

if TYPE_CHECKING:
    from foveate.methods.base import Method


DEFAULT = "divprune"  # none before the LLM is clearly better, and it reads features only: benchmarks/defaults.py


def typed(text: str) -> Any:
    """The value that `text` writes, as `grammar.typed` reads it.

    Raises:
        Mistake: for a number that is not finite.
    """
    try:
        return grammar.typed(text)
    except ValueError as error:
        raise Mistake(str(error)) from error


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


def parse_methods(text: str) -> list[Parts]:
    """What `--methods` says: a list of methods, each alone or several that act together.

    Raises:
        Mistake: where it is written otherwise.
    """
    try:
        return grammar.parse_methods(text)
    except ValueError as error:
        raise Mistake(f"--methods {text}: {error}") from error


def options_in(text: str) -> Iterator[dict[str, Any]]:
    """The options of every method that `--methods` names."""
    return (part.options for parts in parse_methods(text) for part in parts)


def check_alone(text: str) -> None:
    """Refuse, where a budget is what is looked for, methods that act together or say themselves what they keep."""
    for parts in parse_methods(text):
        if len(parts) > 1:
            raise Mistake(f"{label(parts)}: give each method alone here, with a comma between them")
        if "keep" in parts[0].options:
            raise Mistake(f"{label(parts)}: how much is kept is what this command looks for: leave keep out")


def natural_method(fits: Sequence[str]) -> str:
    """The method to take where nobody named one, no blind one if there is another. fits: those that fit the model."""
    import foveate

    chosen = [name for name in fits if not foveate.method_class(name).source.startswith("baseline")]
    return DEFAULT if DEFAULT in fits else [*chosen, *fits][0]


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

    wanted: dict[str, tuple[Parts, bool]] = {}
    for name in always:
        if foveate.method_class(name).place in places:
            wanted[name] = (Part(name, {}),), False
    for parts in parse_methods(methods):
        if parts == (Part("all", {}),):
            for each in foveate.methods():
                for choice in _choices(each):
                    wanted.setdefault(str(choice), ((choice,), False))
        else:
            wanted[label(parts)] = parts, True
    chosen, left_out = [], []
    for text, (parts, named) in wanted.items():
        try:
            for part in parts:
                place = foveate.method_class(part.name).place
                if place not in places:
                    which = part.name if len(parts) > 1 else "it"
                    raise ValueError(f"{which} drops tokens {PLACES[place]}, which {model_type} models lack")
            chosen += [Variant(text, keep, built, named) for keep, built in _built(parts, keeps, seed, guide)]
        except (ValueError, TypeError) as error:
            line = f"{text}: {' '.join(str(error).split())}"
            if named:
                raise Mistake(line) from error
            left_out.append(line)
    return chosen, left_out


def _built(
    parts: Parts, keeps: Sequence[float | int], seed: int | None, guide: str | None
) -> Iterator[tuple[float | int, tuple[Method, ...]]]:
    """The methods at every keep; once, where all say themselves what they keep."""
    import foveate

    if all("keep" in part.options for part in parts):
        keeps = [parts[-1].options["keep"]]
    for keep in keeps:
        methods = []
        for part in parts:
            cls = foveate.method_class(part.name)
            drawn = {"seed": seed} if seed is not None and "seed" in option_names(cls) else {}
            own = {"keep": keep, **drawn, **part.options, **guide_option(cls, part.options, guide)}
            methods.append(foveate.get_method(part.name, **own))
        yield keep, tuple(methods)


def _choices(name: str) -> Iterator[Part]:
    """The method as it is, and with each other value of an option that is a choice of words (`fopru:strategy=row`)."""
    import foveate

    cls = foveate.method_class(name)
    hints = get_type_hints(cls)
    yield Part(name, {})
    for option in dataclasses.fields(cls):
        if get_origin(hints[option.name]) is Literal:
            for value in get_args(hints[option.name]):
                if isinstance(value, str) and value != option.default:
                    yield Part(name, {option.name: value})
