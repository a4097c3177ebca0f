"""The model families foveate knows: one file each, saying where things are. They know no method.

A module of this folder is known as soon as it is here; other packages use the entry point group `foveate.families`.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

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


def unknown_family(model_type: str) -> str:
    """A sentence on a model type that is no family's, which names the families closest to it."""
    close = difflib.get_close_matches(model_type, family_names(), n=3, cutoff=0.4)
    hint = f"closest to it: {', '.join(close)}; " if close else ""
    return (
        f"foveate does not know the model family {model_type!r} ({hint}`foveate families` lists all). "
        "docs/adding-a-family.md shows how to add one"
    )


def get_family(model: str | Any) -> Family | None:
    """The family of a model type, or None when there is none.

    model: the type, or a configuration, which may say more: one type may come with encoders of several kinds.

    Raises:
        ValueError: for a plug-in that could not be loaded.
    """
    if isinstance(model, str):
        return _registry.get(model)
    family = _registry.get(model.model_type)
    return None if family is None else family.of(model)
