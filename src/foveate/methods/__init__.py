"""The methods: one file each, a dataclass of options and its maths on plain tensors. No model is needed here."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .base import Method

_BUILT_IN = (
    "fopru",
    "plphp",
    "trimmed_llama",
    "fastv",
    "baselines",
    "vtc_cls",
    "visionzip",
    "divprune",
    "pooling",
    "visual_snapkv",
    "csp",
    "aircache",
    "elastic_cache",
    "zipvl",
    "pyramiddrop",
    "sparsevlm",
    "dart",
    "topv",
    "sgl",
    "mint",
)
_registry: dict[str, type[Method]] = {}
M = TypeVar("M", bound="type[Method]")


def register(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known as `name`. A name that is taken raises ValueError."""

    def add(cls: M) -> M:
        if _registry.setdefault(name, cls) is not cls:
            raise ValueError(f"a method named {name!r} is registered already: {_registry[name].__qualname__}")
        cls.name = name
        return cls

    return add


def _load() -> dict[str, type[Method]]:
    for module in _BUILT_IN:
        import_module(f"{__name__}.{module}")
    # Third parties name the module or class that registers their method.
    for entry in entry_points(group="foveate.methods"):
        entry.load()
    return _registry


def method_names() -> list[str]:
    """The names of all registered methods, sorted."""
    return sorted(_load())


def method_class(name: str) -> type[Method]:
    """The class of the method called `name`; ValueError lists the known names."""
    known = _load()
    if name not in known:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def get_method(name: str, /, **options: Any) -> Method:
    """Build the method called `name` with its options.

    Raises:
        ValueError: for an unknown name, an option that the method lacks, or a value outside its range.
    """
    cls = method_class(name)
    fields = cls.__dataclass_fields__
    if unknown := sorted(set(options) - set(fields)):
        raise ValueError(f"{name} has no option {', '.join(unknown)}; its options: {', '.join(fields)}")
    return cls(**options)
