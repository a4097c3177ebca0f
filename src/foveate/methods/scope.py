"""SCOPE: keep the tokens that matter and that cover what no kept one covers yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import register
from .base import EncoderMethod
from .budgets import check_choice, check_range
from .greedy import LIMIT, Cosines, covering_first, earliness, first_of
from .tokens import EncoderTokens


def salient_cover(features: Tensor, saliency: Tensor, alpha: float, steps: int, limit: int = LIMIT) -> Tensor:
    """Tokens in the order in which each adds most coverage, times how salient it is.

    A token covers every other one by the cosine of the two; it adds what it covers beyond the best of those chosen.

    features: (tiles, n, hidden). saliency: (tiles, n), none negative; only ratios within a tile matter. alpha: its
    power. steps: how many to pick, in [1, n]. limit: of the elements in the tables of the tiles that are worked on
    together. Returns int64 (tiles, steps).
    """
    n = features.shape[1]
    if len(features) > (together := max(1, limit // n**2)):
        parts = zip(features.split(together), saliency.split(together), strict=True)
        return torch.cat([salient_cover(*part, alpha, steps, limit) for part in parts])
    ratio = saliency.double() / saliency.double().amax(1, keepdim=True).clamp(min=1e-300)
    (_, table), *_ = Cosines(features, max(limit, n**2)).blocks()
    return covering_first(table, ratio**alpha, steps)


@register("scope")
@dataclass
class SCOPE(EncoderMethod):
    """Keep tokens that are salient and unlike those kept: greedily, the one with the largest gain in coverage times
    saliency.

    Coverage is the sum over all tokens of the tile of their best cosine with a kept one; saliency is the attention that
    [CLS] pays in the penultimate encoder layer, mean over heads, or without a [CLS] token the attention that patches
    receive there. Tiled models: every tile is worked on separately and gets its share of the image's budget.

    keep: fraction of each image's tokens, or tokens per image; 0.25 is this library's default, that of the other
        methods before the LLM.
    alpha: the power of the saliency; 1 is the default of a re-implementation by others (the authors' code takes it from
        the environment). 0 asks for coverage alone, and the larger it is, the more the saliency alone decides.
    compare: the tokens whose cosines are taken: "states", in front of the projector, as in the authors' code; or
        "features", as the LLM will see them, as in that re-implementation.

    Source: SCOPE, arXiv 2510.24214; the rule from the authors' code and from AngelSlim's, which agree on it. The
    authors sum attention over heads, which changes no ratio. Survivors keep their original positions.
    """

    summary = "greedy coverage of the tokens' similarities, weighted by attention, before the LLM"
    source = "SCOPE, arXiv 2510.24214"
    reads = frozenset({"cls", "states", "features"})

    keep: float | int = 0.25
    alpha: float = 1.0
    compare: Literal["states", "features"] = "states"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, 0)
        check_choice("compare", self.compare, ("states", "features"))

    def _order(self, tokens: EncoderTokens) -> Tensor:
        """Tokens as they are picked, as many as any budget asks for: (tiles, steps)."""
        assert tokens.cls is not None and tokens.states is not None and tokens.features is not None
        compared = tokens.states if self.compare == "states" else tokens.features
        n = compared.shape[1]
        return salient_cover(compared, tokens.cls[:, -1], self.alpha, min(n, tokens.most or n))

    def score(self, tokens: EncoderTokens) -> Tensor:
        return earliness(self._order(tokens), tokens.grid[0] * tokens.grid[1])

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        return first_of(self._order(tokens), budget, tokens.grid[0] * tokens.grid[1])
