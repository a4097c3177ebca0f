"""The model families foveate knows: one file each, saying where things are. They know no method.

A module of this folder is known as soon as it is here; other packages use the entry point group `foveate.families`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..registry import Registry

if TYPE_CHECKING:
    from .base import Family

_registry: Registry[Family] = Registry("family", __name__)


def register(cls: type[Family]) -> type[Family]:
    """Class decorator: make a family known by its `model_type`. A type that is taken raises ValueError."""
    _registry.add(cls.model_type, cls())
    return cls


def family_names() -> list[str]:
    """The model types that can be pruned, sorted."""
    return sorted(_registry.known())


def get_family(model_type: str) -> Family | None:
    """The family of a model type, or None when there is none.

    Raises:
        ValueError: for a plug-in that could not be loaded.
    """
    return _registry.get(model_type)
