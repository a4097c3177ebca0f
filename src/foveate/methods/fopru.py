"""FoPru: focal pruning by what the vision encoder itself attends to, before the LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from . import register
from .base import EncoderMethod
from .budgets import check_choice, check_range, topk_mask
from .tokens import EncoderTokens


def significance(received: Tensor, given: Tensor) -> Tensor:
    """The one of the two attention vectors that varies more, chosen per tile (`received` on a tie).

    received, given: (tiles, n), mean over heads and over the other side of the attention map.
    Returns (tiles, n).
    """
    varies = given.var(dim=-1, unbiased=False) > received.var(dim=-1, unbiased=False)
    return given.where(varies.unsqueeze(-1), received)


def top_tokens(scores: Tensor, budget: Tensor) -> Tensor:
    """`rank`: the `budget` most significant tokens of each tile. scores: (tiles, n); returns bool (tiles, n)."""
    return topk_mask(scores, budget)


def top_rows(scores: Tensor, budget: Tensor, grid: tuple[int, int]) -> Tensor:
    """`row`: the `budget // columns` whole grid rows (at least one) with the highest mean significance.

    scores: (tiles, rows * columns) in raster order. Returns bool of the same shape.
    """
    rows, columns = grid
    chosen = topk_mask(scores.view(-1, rows, columns).mean(-1), (budget // columns).clamp(min=1))
    return chosen.repeat_interleave(columns, dim=-1)


@register("fopru")
@dataclass
class FoPru(EncoderMethod):
    """Keep the tokens (or whole rows) that the vision encoder attends to; original order and positions stay.

    The attention is that of the penultimate encoder layer, averaged over heads, patch to patch (the [CLS]
    token takes no part): the attention each patch *receives* or *gives*, whichever vector varies more.
    Encoders with windows are read in their last full-attention block that is not the final block.
    Tiled models: every tile is scored separately and gets its share of the image's budget.

    keep: fraction of each image's tokens, or tokens per image; the method's only parameter in the paper.
        0.25 is this library's default: losses within 1 % are reported there on several data sets.
    strategy: "rank" keeps the top tokens, "row" the top whole grid rows; "rank" is this library's default.
    back: how many encoder layers before the penultimate one are read instead; 0 is the paper's rule.
    attention: "patches", the paper's rule, or "cls": what [CLS] pays to each patch instead (what patches receive where
        the encoder has no [CLS]).

    In an encoder without [CLS] every patch gives 1 / n, exactly, so that `received` always varies more; with one,
    `given` is 1 / n less what goes to [CLS], and hardly ever does.

    Source: FoPru, arXiv 2411.14164 (stages from the abstract; formulas from secondary descriptions, since no
    code is public). Survivors keep their original position ids: the paper describes none, and compact ids
    cost grounding (GAP, arXiv 2506.21873).
    """

    summary = "vision-encoder attention ranks tokens (or whole rows) before the LLM"
    source = "FoPru, arXiv 2411.14164"

    keep: float | int = 0.25
    strategy: Literal["rank", "row"] = "rank"
    back: int = 0
    attention: Literal["patches", "cls"] = "patches"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("back", self.back, 0, integer=True)
        check_choice("attention", self.attention, ("patches", "cls"))
        check_choice("strategy", self.strategy, ("rank", "row"))

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"cls"} if self.attention == "cls" else {"received", "given"})

    @property
    def vision_layers(self) -> int:
        return self.back + 1

    @property
    def fills_budget(self) -> bool:
        return self.strategy == "rank"

    def score(self, tokens: EncoderTokens) -> Tensor:
        # The first of the layers that are read is the farthest back.
        if self.attention == "cls":
            assert tokens.cls is not None
            return tokens.cls[:, 0]
        assert tokens.received is not None and tokens.given is not None
        return significance(tokens.received[:, 0], tokens.given[:, 0])

    def mass(self, tokens: EncoderTokens) -> Tensor:
        return self.score(tokens)

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        scores = self.score(tokens)
        return top_tokens(scores, budget) if self.strategy == "rank" else top_rows(scores, budget, tokens.grid)
