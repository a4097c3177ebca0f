"""Tiny random models, one file a family: see `base.Tiny`.

A module of this folder is known as soon as it is here; other packages use the entry point group `foveate.testing.tiny`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...registry import Registry

if TYPE_CHECKING:
    from .base import Tiny

_registry: Registry[Tiny] = Registry("tiny model", __name__)


def register(tiny: Tiny) -> None:
    """Make a tiny model known by its name. A name that is taken raises ValueError."""
    _registry.add(tiny.name, tiny)


def built_in() -> dict[str, Tiny]:
    """The tiny models that foveate brings, by name."""
    return _registry.built_in()


def known() -> dict[str, Tiny]:
    """All tiny models, by name."""
    return _registry.known()
