"""Baselines for what a decoding step reads: by the step before, the sum of all, bounds of pages, the turn's rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import register
from .budgets import check_range
from .stepwise import DecodeMethod, Memory
from .tokens import LayerTokens


def received_by_images(tokens: LayerTokens, rows: Tensor) -> Tensor:
    """Attention of chosen rows on the images, summed; of the query heads that share a KV head the most.

    rows: (batch, r), -1 counts nothing. Returns (groups, kv_heads, n), 0 at padding.
    """
    received = tokens.of_images(tokens.received(rows)).clamp(min=0)
    return received.unflatten(1, (tokens.key.shape[1], -1)).amax(2)


@register("last_step")
@dataclass
class LastStep(DecodeMethod):
    """Baseline: a step reads what the steps before it looked at; of a token that none of them read, what the last did.

    keep: fraction of each image's tokens that a step reads, or tokens per image; 0.25 is this library's default.
    refresh: every so many steps everything is read, and looked at anew; None for never.
    dense_layers: layers at the bottom that always read everything.

    Source: a baseline of this library; what attention that stays where it is would need.
    """

    summary = "baseline: each decoding step reads what the last one attended to; nothing is evicted"
    source = "baseline"

    keep: float | int = 0.25

    def observe(self, tokens: LayerTokens, memory: Memory) -> Memory:
        return {"attention": received_by_images(tokens, tokens.last.unsqueeze(1))}

    def score(self, memory: Memory, query: Tensor, scaling: float) -> Tensor:
        return memory["attention"]

    def remember(self, memory: Memory, received: Tensor, attended: Tensor) -> Memory:
        return {"attention": received.where(attended, memory["attention"])}


@register("running_sum")
@dataclass
class RunningSum(DecodeMethod):
    """Baseline: a step reads what got most attention so far, from the prompt's text behind the image and all steps.

    keep: fraction of each image's tokens that a step reads, or tokens per image; 0.25 is this library's default.
    refresh: every so many steps everything is read; None for never.
    dense_layers: layers at the bottom that always read everything.

    Source: the score of H2O, arXiv 2306.14048, over image tokens, and without its evictions.
    """

    summary = "baseline: each decoding step reads what got most attention so far (H2O's sum); nothing is evicted"
    source = "baseline (H2O's score, arXiv 2306.14048)"

    keep: float | int = 0.25

    def observe(self, tokens: LayerTokens, memory: Memory) -> Memory:
        new = received_by_images(tokens, tokens.text)
        return {"attention": new + memory["attention"] if memory else new}

    def score(self, memory: Memory, query: Tensor, scaling: float) -> Tensor:
        return memory["attention"]

    def remember(self, memory: Memory, received: Tensor, attended: Tensor) -> Memory:
        return {"attention": memory["attention"] + received}


def page_bounds(keys: Tensor, present: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """The least and the most of every coordinate among the keys of each page.

    keys: (groups, heads, n, d). present: bool (groups, n). Returns two (groups, heads, pages, d), 0 in
    pages of padding.
    """
    fill = -keys.shape[2] % page
    there = torch.nn.functional.pad(present, (0, fill)).unflatten(1, (-1, page))[:, None, :, :, None]
    paged = torch.nn.functional.pad(keys, (0, 0, 0, fill)).unflatten(2, (-1, page))
    some = there.any(3)
    low = paged.masked_fill(~there, torch.finfo(keys.dtype).max).amin(3).where(some, 0)
    high = paged.masked_fill(~there, torch.finfo(keys.dtype).min).amax(3).where(some, 0)
    return low, high


@register("pages")
@dataclass
class Pages(DecodeMethod):
    """Baseline: a step reads the pages of the image whose keys may fit its query best, by the bounds of their keys.

    Each page of tokens keeps the least and the most of every coordinate of its keys; a query's product with any key of
    the page cannot exceed the sum of the larger products with the two. Of the query heads that share a KV head the most
    counts.

    keep: fraction of each image's tokens that a step reads, or tokens per image; 0.25 is this library's default.
    page: tokens in a row; 16 is Quest's.
    refresh: None, since nothing is remembered.
    dense_layers: layers at the bottom that always read everything; 2 is Quest's, too.

    Source: Quest, arXiv 2406.10774 (bounds, page size), over image tokens only.
    """

    summary = "baseline: each decoding step reads the pages whose keys may fit its query best (Quest)"
    source = "baseline (Quest, arXiv 2406.10774)"
    remembers = False

    keep: float | int = 0.25
    page: int = 16
    refresh: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("page", self.page, 1, integer=True)

    def observe(self, tokens: LayerTokens, memory: Memory) -> Memory:
        if memory:  # keys stay what they are
            return memory
        present = tokens.groups.present
        # Tokens of one image may stand apart, with padding at either end.
        order = present.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        there = present.gather(1, order)
        keys = tokens.image_keys().gather(
            2, order[:, None, :, None].expand(-1, tokens.key.shape[1], -1, tokens.key.shape[3])
        )
        low, high = page_bounds(keys, there, self.page)
        return {"low": low, "high": high, "page": (present.cumsum(-1) - 1).clamp(min=0) // self.page}

    def score(self, memory: Memory, query: Tensor, scaling: float) -> Tensor:
        low, high = memory["low"], memory["high"]
        heads = low.shape[1]
        grouped = query.unflatten(1, (heads, -1)).unsqueeze(3)  # (groups, kv_heads, shared, 1, d)
        bound = torch.maximum(grouped * low.unsqueeze(2), grouped * high.unsqueeze(2)).float().sum(-1).amax(2)
        return bound.gather(2, memory["page"].unsqueeze(1).expand(-1, heads, -1))


@register("per_turn")
@dataclass
class PerTurn(DecodeMethod):
    """Choose anew for every turn: its steps read what its last rows attended to, and the rest waits for the next.

    As visual_snapkv does it, without the eviction that leaves a later question with what an earlier one chose.

    keep: fraction of each image's tokens that a step reads, or tokens per image; 0.25 is this library's default.
    window: rows at the end of each turn; 32 as in visual_snapkv.
    refresh: None, since the choice stands for the turn.
    dense_layers: layers at the bottom that always read everything; 0: eviction has none either.

    Source: SnapKV, arXiv 2404.14469, for the score; that nothing is evicted is this library's.
    """

    summary = "each turn's last rows choose what its decoding steps read; nothing is evicted for the turns to come"
    source = "SnapKV's score, arXiv 2404.14469"
    remembers = False

    keep: float | int = 0.25
    window: int = 32
    refresh: int | None = None
    dense_layers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("window", self.window, 1, integer=True)

    def observe(self, tokens: LayerTokens, memory: Memory) -> Memory:
        received = tokens.of_images(tokens.received(tokens.recent(self.window))).clamp(min=0)
        return {"attention": tokens.per_kv_head(received)}

    def score(self, memory: Memory, query: Tensor, scaling: float) -> Tensor:
        return memory["attention"]
