"""FastV: half the image tokens leave after layer 2."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import register
from .base import LayerMethod
from .budgets import check_range, floor_budget, topk_mask
from .tokens import LayerTokens


def received_attention(attention: Tensor) -> Tensor:
    """Mean over heads of the attention that the last prompt token pays. (groups, heads, n) -> (groups, n)."""
    return attention.mean(dim=1)


@register("fastv")
@dataclass
class FastV(LayerMethod):
    """Drop the image tokens that the last prompt token ignores in layer `layer - 1`; later layers never see them.

    The score is the attention of the last prompt token, averaged over heads and restricted to the image span.
    Kept tokens keep their order and position ids; layers before `layer` keep their full cache. Where a sample
    has several images, each keeps its own share.

    keep: fraction of each image's tokens, or tokens per image (1 - R in the paper); 0.5 is the paper's default.
    layer: the first layer without the dropped tokens (K in the paper); 2 is the paper's default.

    Source: FastV, arXiv 2403.06764, and the authors' code. The paper's text averages over all queries; the code
    reads the last row, as here.
    """

    summary = "last prompt token's attention after an early layer drops tokens inside the LLM"
    source = "FastV, arXiv 2403.06764"

    keep: float | int = 0.5
    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("layer", self.layer, 1, integer=True)

    def stages(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def score(self, tokens: LayerTokens) -> Tensor:
        return received_attention(tokens.last_attention())

    def select(self, tokens: LayerTokens) -> Tensor:
        return topk_mask(self.score(tokens), floor_budget(self.share(tokens.groups), tokens.groups))
