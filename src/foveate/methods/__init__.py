"""The methods: one file each, a dataclass of options and its maths on plain tensors. No model is needed here.

A module of this folder is known as soon as it is here; other packages use the entry point group `foveate.methods`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..registry import Registry

if TYPE_CHECKING:
    from .base import Method

_registry: Registry[type[Method]] = Registry("method", __name__)
M = TypeVar("M", bound="type[Method]")


def register(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known as `name`. A name that is taken raises ValueError."""

    def add(cls: M) -> M:
        _registry.add(name, cls)
        cls.name = name
        return cls

    return add


def built_in_classes() -> dict[str, type[Method]]:
    """The classes of foveate's own methods, by their own names: `{"FoPru": FoPru, ...}`."""
    return {cls.__name__: cls for cls in _registry.built_in().values()}


def method_names() -> list[str]:
    """The names of all registered methods, sorted."""
    return sorted(_registry.known())


def known_as(name: str) -> str | None:
    """The name of the method that is meant, without regard to case, `-` and `_`, so that the class's does, too."""
    names = method_names()
    return name if name in names else next((known for known in names if _folded(known) == _folded(name)), None)


def method_class(name: str) -> type[Method]:
    """The class of the method called `name`; ValueError says what may have been meant, or lists the known names."""
    cls = _registry.get(known_as(name) or name)
    if cls is None:
        from difflib import get_close_matches

        folded = {_folded(known): known for known in method_names()}
        near = [folded[close] for close in get_close_matches(_folded(name), folded)]
        hint = (
            f"did you mean {' or '.join(near)}? (all: foveate methods)"
            if near
            else f"known: {', '.join(folded.values())}"
        )
        raise ValueError(f"unknown method {name!r}; {hint}")
    return cls


def get_method(name: str, /, **options: Any) -> Method:
    """Build the method called `name` with its options.

    name: also with options behind it as the command line writes them, such as "plphp:delta=0.2".
    options: those of its dataclass; and `mass`, in place of one `keep` for all images, the share of the method's own
        scores that each keeps, in (0, 1], where the method has no such option itself.

    Raises:
        ValueError: for an unknown name, an option that the method lacks, or a value outside its range.
        UnsupportedError: for `mass` of a method whose scores do not add up.
    """
    if ":" in name:
        from .grammar import build, parse_method

        parts = parse_method(name)
        if len(parts) > 1:
            raise ValueError(f"{name}: give one method here; prune takes several")
        return build(parts[0], **options)
    cls = method_class(name)
    fields = option_names(cls)
    mass = None if "mass" in fields else options.pop("mass", None)
    if unknown := sorted(set(options).difference(fields)):
        raise ValueError(f"{cls.name} has no option {', '.join(unknown)}; its options: {', '.join(fields)}")
    if mass is None:
        return cls(**options)
    from .mass import by_mass

    return by_mass(cls(**options), mass)


def option_names(cls: type[Method]) -> list[str]:
    """The names of a method's options, in their order."""
    import dataclasses  # here, since it imports inspect and `import foveate` should stay quick

    return [field.name for field in dataclasses.fields(cls)]


def _folded(name: str) -> str:
    return name.replace("_", "").replace("-", "").casefold()
