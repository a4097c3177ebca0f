"""What is made once, and asked for in every layer or step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Once:
    """What was made of some objects, for as long as these very objects come again.

    most: so many results are held; in front of one more, all are forgotten.
    """

    def __init__(self, most: int = 8) -> None:
        self._most = most
        self._made: dict[tuple[int, ...], tuple[tuple[Any, ...], Any]] = {}

    def __call__(self, make: Callable[[], T], *of: Any, key: tuple[int, ...] = ()) -> T:
        """What `make` makes of these objects. key: numbers that it depends on, too."""
        at = (*map(id, of), *key)
        if at not in self._made:
            made = make()
            if len(self._made) >= self._most:
                self._made.clear()
            # The objects are held, so that no other can come to have the identity of one.
            self._made[at] = (of, made)
        found: T = self._made[at][1]
        return found

    def forget(self) -> None:
        """Make everything anew."""
        self._made.clear()
