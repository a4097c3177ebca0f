"""Baselines every method has to beat: tokens chosen blindly, before the LLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import register
from .base import EncoderMethod, EncoderTokens, check_range, topk_mask


def strided(budget: Tensor, n: int) -> Tensor:
    """`budget` of `n` tokens at an even stride, the first at half a stride. budget: (tiles,); bool (tiles, n)."""
    # In units of 1/k token the strides end at multiples of n; half a stride of offset centres the choice.
    offset = torch.arange(n + 1, device=budget.device) * budget.unsqueeze(-1) + n // 2
    return (offset // n).diff(dim=-1) > 0


@register("random")
@dataclass
class Random(EncoderMethod):
    """Keep tokens drawn uniformly at random; the baseline that many published methods do not beat.

    The draw depends on `seed` and the tile's size alone, so that a picture keeps the same tokens in any batch.

    keep: fraction of each image's tokens, or tokens per image; 0.25 is this library's default.
    seed: of the draw.

    Source: a baseline; its strength is documented in arXiv 2502.11501 and 2511.02650.
    """

    summary = "baseline: tokens drawn at random (seeded), before the LLM"
    source = "baseline (arXiv 2502.11501)"

    keep: float | int = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("seed", self.seed, 0, 2**63 - 1, integer=True)

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        # Drawn on the CPU, so that every device keeps the same tokens.
        scores = torch.rand(tokens.grid[0] * tokens.grid[1], generator=torch.Generator().manual_seed(self.seed))
        return topk_mask(scores.to(tokens.device).expand(tokens.tiles, -1), budget)


@register("uniform")
@dataclass
class Uniform(EncoderMethod):
    """Keep every n-th token in raster order: an even stride over the picture.

    keep: fraction of each image's tokens, or tokens per image; 0.25 is this library's default.

    Source: a baseline; its strength is documented in FEATHER, arXiv 2412.13180.
    """

    summary = "baseline: every n-th token, before the LLM"
    source = "baseline (arXiv 2412.13180)"

    keep: float | int = 0.25

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        return strided(budget, tokens.grid[0] * tokens.grid[1])
