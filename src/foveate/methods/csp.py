"""CSP: cross-self pruning, which ranks image entries apart by what text and what image rows pay them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import register
from .base import CacheMethod
from .budgets import check_range, topk_mask
from .tokens import LayerTokens, thinned


def window_rows(tokens: LayerTokens, share: float) -> Tensor:
    """The last `share` of each sample's prompt, at least its last row: (batch, r), -1 where a sample has fewer."""
    keys = tokens.key.shape[2]
    length = tokens.last + tokens.past + 1 if tokens.visible is None else tokens.visible.sum(1)
    rows = tokens.recent(max(1, int(share * keys + 1e-4)))
    own = (share * length + 1e-4).floor().clamp(min=1)
    age = torch.arange(rows.shape[1] - 1, -1, -1, device=rows.device)
    return torch.where(age < own.unsqueeze(1), rows, -1)


def with_zero_logit(tokens: LayerTokens) -> LayerTokens:
    """The same layer with a zero key in front: its softmax is softmax_1, one more in the denominator."""
    visible = None if tokens.visible is None else pad(tokens.visible, (1, 0), value=True)
    sees = None if tokens.sees is None else pad(tokens.sees, (1, 0), value=True)
    return replace(tokens, key=pad(tokens.key, (0, 0, 1, 0)), visible=visible, sees=sees)


def split_budget(cross: Tensor, own: Tensor, budget: Tensor, share: float) -> Tensor:
    """The top `floor(share * budget)` by `cross`, then from the others the top by `own`: `budget` in all.

    cross, own: (groups, heads, n), -inf at padding. budget: (groups,). Where one of the two scores nothing at all,
    the other has the whole budget. Returns bool (groups, heads, n).
    """
    budget = budget.unsqueeze(-1).expand(cross.shape[:-1])
    first = (budget * share + 1e-4).floor().long()
    first = first.where((own > 0).any(-1), budget).where((cross > 0).any(-1), 0)
    picked = topk_mask(cross, first)
    return picked | topk_mask(own.masked_fill(picked, -torch.inf), budget - first)


@register("csp")
@dataclass
class CSP(CacheMethod):
    """Keep what text rows look at and, with a budget of its own, what image rows look at.

    The attention of the prompt's last rows is worked out again with softmax_1 (1 + the sum of exponentials as
    denominator), summed over the rows, and split: cross from text rows, self from image rows. Each KV head keeps the
    top `cross_share` of its budget by cross and fills the rest by self among the tokens not picked yet. Where the
    window holds rows of one kind only, that kind decides alone; rows that structure an image count as image rows.

    keep: fraction of each image's tokens, or tokens per image; 0.2 is this library's default: the share of the
        whole prompt that the authors' code keeps (its hh_ratio and recent_ratio, 0.1 each).
    window: the share of the prompt whose rows are read, in (0, 1]; 0.1 is the default of the authors' code.
    rows: how many of these rows are read, at an even stride, and stand for all; None, the default, for all, as in the
        authors' code.
    cross_share: the part of the budget that cross decides, in [0, 1]; 0.5 is what the authors' code sets for 19
        of its 29 data sets (0 to 0.9 for the others).

    Source: CSP, arXiv 2412.04652, and the authors' code. That code ranks text and image entries together, always
    keeps the window, and keeps an entry twice where both halves pick it; here only image tokens compete and every
    entry counts once.
    """

    summary = "text rows and image rows of the prompt's end each choose a part, evicted per head"
    source = "CSP, arXiv 2412.04652"

    keep: float | int = 0.2
    window: float = 0.1
    cross_share: float = 0.5
    rows: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("window", self.window, 0, 1)
        if self.window == 0:
            raise ValueError("window must be a number in (0, 1], got 0")
        check_range("cross_share", self.cross_share, 0, 1)
        if self.rows is not None:
            check_range("rows (if not None)", self.rows, 1, integer=True)

    def score(self, tokens: LayerTokens) -> Tensor:
        """(groups, kv_heads, 2, n): cross and self."""
        rows, layer = window_rows(tokens, self.window), with_zero_logit(tokens)
        if self.rows is not None:
            # The same for text and image rows, whose sums are ranked apart: what each row stands for would cancel.
            rows, _ = thinned(rows, self.rows)
        is_text = tokens.keys_of(tokens.text).gather(1, rows.clamp(min=0) + tokens.past)
        halves = layer.received(rows, torch.stack([is_text, ~is_text], dim=-1).float())[..., 1:]
        return tokens.per_kv_head(tokens.of_images(halves))

    def mass(self, scores: Tensor) -> Tensor:
        return scores.sum((1, 2))

    def select(self, scores: Tensor, budget: Tensor) -> Tensor:
        return split_budget(scores[:, :, 0], scores[:, :, 1], budget, self.cross_share)
