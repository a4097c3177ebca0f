"""SGL: a small model looks first, and tells the large one where."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from . import register
from .base import GuidedMethod
from .budgets import check_keep, check_range, floor_budget, topk_mask
from .tokens import LayerTokens


def guided_tokens(guidance: Tensor, budget: Tensor) -> Tensor:
    """The `budget` image tokens that the guide attends to most. guidance: (groups, n), -inf at padding."""
    return topk_mask(guidance, budget)


def confidence(sure: Tensor, real: Tensor) -> Tensor:
    """Geometric mean of the probabilities of an answer's tokens. sure: (batch, t) log-probabilities."""
    return ((sure * real).sum(-1) / real.sum(-1).clamp(min=1)).exp()


def consistency(checked: Tensor, real: Tensor) -> Tensor:
    """Probability of the same answer as a whole, under the pruned guide. checked: (batch, t) log-probabilities."""
    return (checked * real).sum(-1).exp()


@register("sgl")
@dataclass
class SGL(GuidedMethod):
    """Drop the image tokens that a small model, the guide, hardly looked at while it answered the same question.

    The guide answers greedily with all image tokens. A token's score is the attention it received there, summed over
    all layers and heads, from every text token of the prompt behind the image and from every generated token. The
    large model drops the lowest in front of `layer`; kept tokens keep their order and position ids. Where a sample has
    several images, all text behind the first of them counts, and each image keeps its own share. With `exit_threshold`
    the guide's answer is returned where it can be trusted, and the large model is not run: the score is the mean of
    the answer's confidence (geometric mean of its tokens' probabilities) and of its consistency (its probability with
    only `consistency_keep` of the image tokens).

    keep: fraction of each image's tokens, or tokens per image; 0.3 is the default of the authors' code.
    guide: the small model, of the same family, with the same tokenizer and as many tokens for every image.
    layer: the first layer of the large model without the dropped tokens; None for 0.3 of its depth, rounded down, the
        default of the authors' code.
    exit_threshold: from which score on, in [0, 1], the guide's answer is returned; None, this library's default, asks
        the large model always. A batch is answered by the guide only when all its samples reach the threshold.
    consistency_keep: fraction of each image's tokens, or tokens per image, that the guide is left with in front of its
        first layer when its answer is checked; 0.05 is the default of the authors' code.

    Source: SGL, arXiv 2412.03324, and the authors' code, which runs one sample with one image at a time.
    """

    summary = "the attention of a small model that answers first drops tokens inside the large one"
    source = "SGL, arXiv 2412.03324"

    keep: float | int = 0.3
    guide: Any = field(default=None, repr=False, compare=False)
    layer: int | None = None
    exit_threshold: float | None = None
    consistency_keep: float | int = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.consistency_keep)
        if self.layer is not None:
            check_range("layer", self.layer, 1, integer=True)

    def stages(self, depth: int) -> tuple[int, ...]:
        # The epsilon undoes binary rounding: 0.3 * 10 may be 2.9999999999999996.
        return (max(1, int(0.3 * depth + 1e-6)) if self.layer is None else self.layer,)

    def score(self, tokens: LayerTokens) -> Tensor:
        assert tokens.guidance is not None
        return tokens.guidance

    def select(self, tokens: LayerTokens) -> Tensor:
        return self._top(tokens, self.keep)

    def probe(self, tokens: LayerTokens) -> Tensor:
        return self._top(tokens, self.consistency_keep)

    def _top(self, tokens: LayerTokens, keep: float | int) -> Tensor:
        share = dataclasses.replace(self, keep=keep).share(tokens.groups)
        return guided_tokens(self.score(tokens), floor_budget(share, tokens.groups))

    def exit_score(self, sure: Tensor, checked: Tensor, real: Tensor) -> Tensor:
        return (confidence(sure, real) + consistency(checked, real)) / 2
