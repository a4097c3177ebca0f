"""V2Drop: image tokens that a layer hardly changes leave in stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity

from . import register
from .budgets import check_choice, topk_mask
from .staged import StagedMethod
from .tokens import LayerTokens


def variation(entered: Tensor, left: Tensor, measure: Literal["l2", "cosine"]) -> Tensor:
    """How much a layer changed each token: the length of what it added, or 1 less the cosine of before and after.

    entered, left: (groups, n, hidden). Returns float32 (groups, n).
    """
    if measure == "l2":
        return (left.float() - entered.float()).norm(dim=-1)
    return 1 - cosine_similarity(entered.float(), left.float(), dim=-1)


@register("v2drop")
@dataclass
class V2Drop(StagedMethod):
    """At each stage drop the image tokens that the layer in front of it changed least. No attention is read.

    A token's score is the euclidean length of what that layer wrote to its hidden state. What is dropped stays dropped;
    survivors keep their order and position ids. Where a sample has several images, each keeps its own share.

    keep: fraction of each image's tokens, or tokens per image, left after the last stage; 0.25 is this library's
        default. The authors' code keeps half, then half of these, then a single token:
        `V2Drop(keep=0.001, earlier=(0.5, 0.25))`.
    layers: the first layer without the dropped tokens of each stage; None is the default of the authors' code, 3, 17
        and 22 of 32 layers, at the same relative depth.
    earlier: what the stages before the last leave, each of the same kind as `keep`, descending; None for a geometric
        schedule, `keep ** ((i + 1) / stages)` after stage i.
    measure: "l2", as in the authors' code, or "cosine", one of its ablations: how much the direction turned.

    Source: V2Drop, arXiv 2509.01552, and the authors' code.
    """

    summary = "tokens that a layer hardly changes leave in stages; reads no attention, inside the LLM"
    source = "V2Drop, arXiv 2509.01552"
    published = (3, 17, 22)

    keep: float | int = 0.25
    measure: Literal["l2", "cosine"] = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("measure", self.measure, ("l2", "cosine"))

    def score(self, tokens: LayerTokens) -> Tensor:
        assert tokens.entered is not None and tokens.left is not None
        changed = variation(tokens.image_rows(tokens.entered), tokens.image_rows(tokens.left), self.measure)
        return changed.masked_fill(~tokens.groups.present, float("-inf"))

    def select(self, tokens: LayerTokens) -> Tensor:
        return topk_mask(self.score(tokens), self.stage_budget(tokens))
