"""Base of the methods that let every decoding step read other parts of the KV cache; nothing is evicted."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .budgets import check_range, first_largest, floor_budget
from .method import Method
from .tokens import ImageGroups, LayerTokens

Memory = dict[str, Tensor]


@dataclass
class DecodeMethod(Method):
    """Chooses, in every decoding step, layer and KV head, which image tokens are attended to. Text always is.

    What a method knows of the steps before stands in its memory, tensors by name, each (groups, ...) with a group an
    image. It is kept beside the layer's cache and follows beams as the cache does.

    keep: of each image's tokens, in every layer that chooses.
    refresh: every so many steps a layer reads everything, and its whole attention is remembered; None for never.
    dense_layers: so many layers at the bottom always read everything.
    """

    place: ClassVar = "decode"
    remembers: ClassVar[bool] = True
    """Whether `remember` wants the attention of the steps."""

    refresh: int | None = 5
    dense_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh is not None:
            check_range("refresh", self.refresh, 1, integer=True)
        check_range("dense_layers", self.dense_layers, 0, integer=True)

    def budget(self, groups: ImageGroups) -> Tensor:
        """(groups,) tokens of each image that a step reads."""
        return floor_budget(self.share(groups), groups)

    @abstractmethod
    def observe(self, tokens: LayerTokens, memory: Memory) -> Memory:
        """What one layer remembers behind the prefill of a turn.

        tokens: what the layer computed and attended to; its groups are all images of the cache, its text rows those of
        this turn. memory: of the turns before; empty in the first, and where a turn brings images.
        """

    @abstractmethod
    def score(self, memory: Memory, query: Tensor, scaling: float) -> Tensor:
        """How much each token matters to the step at hand: (groups, kv_heads, n).

        query: (groups, heads, d), after RoPE. scaling: of its products with keys.
        """

    def select(self, scores: Tensor, most: int) -> Tensor:
        """The `most` tokens of each image that matter most in each head, the best first and of equals the earlier.

        scores: (groups, kv_heads, n), -inf at padding. Returns (groups, kv_heads, most), indices of tokens.
        """
        return first_largest(scores, most)

    def remember(self, memory: Memory, received: Tensor, attended: Tensor) -> Memory:
        """The memory behind a step.

        received: (groups, kv_heads, n) attention that each token got, the most of the query heads that share the KV
        head; 0 where it was not attended to. attended: bool of the same shape.
        """
        return memory
