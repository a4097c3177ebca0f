"""What the layers of one KV cache have in common."""

from __future__ import annotations

from .once import Once


class Shared:
    """What the layers of one cache have in common.

    pruned: whether any of them lost entries. once: what is made of their indices, which most of them have alike.
    """

    def __init__(self) -> None:
        self.pruned = False
        self.once = Once()
