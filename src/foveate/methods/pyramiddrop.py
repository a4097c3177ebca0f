"""PyramidDrop: image tokens leave in stages, more of them the deeper the layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import register
from .budgets import topk_mask
from .fastv import received_attention
from .staged import StagedMethod
from .tokens import LayerTokens


@register("pyramiddrop")
@dataclass
class PyramidDrop(StagedMethod):
    """At each stage drop the image tokens that the last prompt token ignores; early layers see nearly all of them.

    The score is the attention of the last prompt token in the first layer behind the stage, as it would be with all
    tokens that came so far, averaged over heads and restricted to the image. What is dropped stays dropped; survivors
    keep their order and position ids. Where a sample has several images, each keeps its own share.

    keep: fraction of each image's tokens, or tokens per image, left after the last stage; 0.125 is the paper's
        default (the stages leave 0.5, 0.25 and 0.125).
    layers: the first layer without the dropped tokens of each stage; None is the paper's default, 8, 16 and 24 of
        32 layers, at the same relative depth.
    earlier: what the stages before the last leave, each of the same kind as `keep`, descending; None for a
        geometric schedule, `keep ** ((i + 1) / stages)` after stage i, which gives the paper's default.

    Source: PyramidDrop, arXiv 2410.17247, and the authors' code (layers, fractions, last instruction token, mean over
    heads, queries and keys of the first layer behind the stage). There position ids are made compact; here they stay.
    """

    summary = "last prompt token's attention drops tokens in stages, most of them in deep layers"
    source = "PyramidDrop, arXiv 2410.17247"
    published = (8, 16, 24)
    looks_ahead = True

    keep: float | int = 0.125

    def score(self, tokens: LayerTokens) -> Tensor:
        return received_attention(tokens.last_attention())

    def select(self, tokens: LayerTokens) -> Tensor:
        return topk_mask(self.score(tokens), self.stage_budget(tokens))
