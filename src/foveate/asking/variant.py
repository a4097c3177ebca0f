"""Methods that a question is asked under, with what was asked of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.methods.base import Method


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
