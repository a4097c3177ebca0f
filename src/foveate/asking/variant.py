"""Methods that questions are asked under."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.methods.base import Method


@dataclass(frozen=True)
class Variant:
    """Methods that act together, at one `keep`.

    label: what they are called in rows and on screen. keep: of those that were written without one, else the last
    method's. named: asked for by name, not by `all`. options: of each method, what was asked for, where that is told.
    """

    label: str
    keep: float | int
    methods: tuple[Method, ...]
    named: bool = True
    options: tuple[dict[str, Any], ...] = ()

    @classmethod
    def asked(cls, methods: Sequence[Method], options: Sequence[dict[str, Any]]) -> Variant:
        """Labelled by what was asked for, such as "csp keep 0.2 + divprune keep 0.5"."""
        parts = zip(methods, options, strict=True)
        label = " + ".join(" ".join([m.name, *(f"{k} {v}" for k, v in own.items())]) for m, own in parts)
        return cls(label, methods[-1].keep, tuple(methods), options=tuple(options))

    @property
    def method(self) -> Method:
        """The one method; `options.check_alone` refuses others where there must be one."""
        (method,) = self.methods
        return method

    @property
    def place(self) -> str:
        """Where they act, joined by "+"."""
        return "+".join(method.place for method in self.methods)
