"""What the layers of one KV cache have in common."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Shared:
    """What the layers of one cache have in common. pruned: whether any of them lost entries."""

    def __init__(self) -> None:
        self.pruned = False
        self._made: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def once(self, index: Tensor, key: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
        """What is made of an index: one tensor for all layers that have it, as most do, and ask in every step."""
        known = self._made.get((id(index), *key))
        if known is None or known[0] is not index:
            if len(self._made) > 8:
                self._made.clear()
            known = self._made[(id(index), *key)] = (index, make())
        return known[1]
