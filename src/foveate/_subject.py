"""What `foveate check` and `foveate show` look at: a loaded model, a question about pictures, and methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from ._asking import Asker
    from .methods.base import Method


@dataclass(frozen=True)
class Variant:
    """Methods that act together. options: of each, what was asked for."""

    methods: tuple[Method, ...]
    options: tuple[dict[str, Any], ...]

    @property
    def label(self) -> str:
        """Names and options in a few words."""
        parts = zip(self.methods, self.options, strict=True)
        return " + ".join(" ".join([m.name, *(f"{k} {v}" for k, v in own.items())]) for m, own in parts)


@dataclass(frozen=True)
class Subject:
    """A model and what it is asked. settings: the same in words, JSON-safe."""

    model: Any
    processor: Any
    asker: Asker
    pictures: Sequence[Image]
    variants: Sequence[Variant]
    settings: dict[str, Any]
