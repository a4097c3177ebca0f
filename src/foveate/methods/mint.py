"""MINT: say more of what the model says when it only sees what matters in the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from . import register
from .base import ContrastMethod
from .budgets import check_choice, check_range, floor_budget, topk_mask
from .fastv import received_attention
from .tokens import LayerTokens


def contrast(full: Tensor, reduced: Tensor, strength: float, plausibility: float, amplify: str = "reduced") -> Tensor:
    """Push the next token from one view towards the other, among those that are plausible with the full view.

    `log softmax((1 + strength) * towards - strength * away)`, where `towards` is the view to `amplify` and `away` the
    other one. Tokens whose probability in the full view is below `plausibility` times the highest, and those that are
    -inf there, are -inf.

    full, reduced: (rows, vocabulary) logits of the two views, up to a constant a row. Returns float32.
    """
    full, reduced = full.float().log_softmax(-1), reduced.float().log_softmax(-1)
    implausible = full.isneginf()
    if plausibility > 0:
        implausible = implausible | (full < full.amax(-1, keepdim=True) + math.log(plausibility))
    towards, away = (reduced, full) if amplify == "reduced" else (full, reduced)
    mixed = (1 + strength) * towards - strength * away
    return mixed.masked_fill(implausible, -math.inf).log_softmax(-1)


@register("mint")
@dataclass
class MINT(ContrastMethod):
    """Against hallucination: contrast the model with itself on the image tokens that matter, at every step.

    Beside the untouched model, which sees the whole picture, a second run drops the image tokens that the last prompt
    token ignores in layer `layer - 1` (mean over heads), as FastV does. The next token is chosen by the contrast of
    the two, among the tokens that the untouched model holds plausible. Nothing gets cheaper: every step runs the
    model twice, and there are two KV caches, the second one smaller. Works in `generate()` only, with greedy decoding,
    sampling and beams. Processors that transformers makes itself, such as a repetition penalty, act before the
    contrast, temperature and top-k behind it.

    keep: fraction of each image's tokens, or tokens per image, in the reduced view; 0.5 is this library's default,
        FastV's, since the published value is not known.
    layer: the first layer of the reduced view without the dropped tokens; 2 is this library's default, FastV's: the
        paper speaks of shallow layers.
    strength: weight of the contrast, 0 for the amplified view alone; 1.0 is this library's default, that of the code
        of VCD (arXiv 2311.16922), since the published value is not known.
    plausibility: share of the highest probability in the full view that a token needs to stay possible, in [0, 1];
        0.1 is this library's default, that of VCD's code.
    amplify: "reduced" pushes from the full view towards the reduced one, "full" the other way round. The abstract
        says that the contrast "pushes the model to focus more on those key image regions", which is "reduced"; the
        formula itself was not available.

    Source: MINT, arXiv 2502.00717 (parts and purpose from the abstract; no code is public).
    """

    summary = "contrasts every step with a run on the image tokens that matter, against hallucination"
    source = "MINT, arXiv 2502.00717"

    keep: float | int = 0.5
    layer: int = 2
    strength: float = 1.0
    plausibility: float = 0.1
    amplify: Literal["reduced", "full"] = "reduced"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("layer", self.layer, 1, integer=True)
        check_range("strength", self.strength, 0)
        check_range("plausibility", self.plausibility, 0, 1)
        check_choice("amplify", self.amplify, ("reduced", "full"))

    def stages(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def score(self, tokens: LayerTokens) -> Tensor:
        return received_attention(tokens.last_attention())

    def select(self, tokens: LayerTokens) -> Tensor:
        return topk_mask(self.score(tokens), floor_budget(self.share(tokens.groups), tokens.groups))

    def contrast(self, full: Tensor, reduced: Tensor) -> Tensor:
        return contrast(full, reduced, self.strength, self.plausibility, self.amplify)
