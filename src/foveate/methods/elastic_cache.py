"""Elastic Cache: dropped image entries are merged into kept neighbours, and decoding evicts at a fixed place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import register
from .base import CacheMethod
from .budgets import check_range
from .tokens import ImageGroups, LayerTokens


def nearest_kept(keep: Tensor, positions: Tensor) -> Tensor:
    """For each token the index of the kept one that lies nearest, the earlier of two; kept tokens are their own.

    keep: bool (groups, heads, n), at least one True per group and head. positions: (groups, n), ascending, -1 at
    padding, whose answer has no meaning. Returns int64 (groups, heads, n).
    """
    n = keep.shape[-1]
    index = torch.arange(n, device=keep.device).expand(keep.shape)
    before = torch.where(keep, index, -1).cummax(-1).values
    behind = torch.where(keep, index, n).flip(-1).cummin(-1).values.flip(-1)
    at = positions.unsqueeze(1).expand(keep.shape)
    to_before = at - at.gather(-1, before.clamp(min=0))
    to_behind = at.gather(-1, behind.clamp(max=n - 1)) - at
    earlier = (before >= 0) & ((behind == n) | (to_before <= to_behind))
    return torch.where(earlier, before, behind).clamp(0, n - 1)


@register("elastic_cache")
@dataclass
class ElasticCache(CacheMethod):
    """Keep the image tokens that all rows attend to, merge the others into them, and hold the length while decoding.

    A token's score is the attention it receives, mean over heads and summed over all rows of the prompt; all heads
    keep the same tokens. The keys and values of a dropped token are averaged into those of the nearest kept token of
    the same image (the earlier of two). While decoding, each step evicts the entry `decode_distance` slots before
    the end of the kept prompt, whatever it is: prompt text at first, and generated tokens later.

    keep: fraction of each image's tokens, or tokens per image; 0.5 is this library's default, a budget at which the
        paper reports its perplexity.
    decode_distance: where decoding evicts, in slots before the end of the kept prompt, at least 1; 25 is the default
        of the authors' code. None evicts nothing while decoding.
    rows: how many rows of the prompt are read, at an even stride, and stand for all; None, the default, for all, as in
        the authors' code. Reading all costs as much as attention itself.

    Source: Elastic Cache, arXiv 2407.18121, and the authors' code. That code scores text as well, takes
    `torch.argsort(scores) > n` for a rank, which it is not (here it is the rank), and reads the dropped entries
    without the offset of its protected start, so that they merge shifted by it (here unshifted). While decoding it
    evicts only as often as keeps the whole cache at its ratio, here every step does.
    """

    summary = "received attention keeps one set for all heads, merges the rest into it, and evicts while decoding"
    source = "Elastic Cache, arXiv 2407.18121"

    keep: float | int = 0.5
    decode_distance: int | None = 25
    rows: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decode_distance is not None:
            check_range("decode_distance (if not None)", self.decode_distance, 1, integer=True)
        if self.rows is not None:
            check_range("rows (if not None)", self.rows, 1, integer=True)

    def score(self, tokens: LayerTokens) -> Tensor:
        """(groups, 1, n)."""
        return tokens.of_images(tokens.received_from_all(self.rows).mean(1, keepdim=True))

    def mass(self, scores: Tensor) -> Tensor:
        return scores[:, 0]

    def merge(self, keep: Tensor, groups: ImageGroups) -> Tensor:
        return nearest_kept(keep, groups.positions)
