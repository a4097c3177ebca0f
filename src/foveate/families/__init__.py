"""The model families foveate knows: one file each, saying where things are. They know no method."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Family

_MODULES = ("llava", "llava_next", "qwen2_5_vl", "mllama")
_registry: dict[str, Family] = {}


def register(cls: type[Family]) -> type[Family]:
    """Class decorator: make a family known by its `model_type`. A type that is taken raises ValueError."""
    if cls.model_type in _registry:
        raise ValueError(f"a family for model type {cls.model_type!r} is registered already")
    _registry[cls.model_type] = cls()
    return cls


def _load() -> dict[str, Family]:
    for module in _MODULES:
        import_module(f"{__name__}.{module}")
    return _registry


def family_names() -> list[str]:
    """The model types that can be pruned, sorted."""
    return sorted(_load())


def get_family(model_type: str) -> Family | None:
    """The family of a model type, or None when there is none."""
    return _load().get(model_type)
