"""Aya Vision and Command A Vision: tiles of one size, and a decoder with windows in most layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import register
from .squares import MarkedTiles, Tiles, split_behind


@register
class AyaVision(MarkedTiles):
    """The token in front of a tile is text."""

    model_type = "aya_vision"
    summary = "Aya Vision (tiles between tokens that name them, sliding windows)"
    examples = ("CohereLabs/aya-vision-8b", "CohereLabs/aya-vision-32b")

    def factor(self, config: Any) -> int:
        return config.downsample_factor


@register
class Cohere2Vision(Tiles):
    """One line break, which is text, stands behind every tile."""

    model_type = "cohere2_vision"
    summary = "Command A Vision (tiles, sliding windows)"
    examples = ("CohereLabs/command-a-vision-07-2025",)

    def factor(self, config: Any) -> int:
        return config.downsample_factor

    def images(self, row: Tensor, starts: Tensor, tokens: int) -> list[Tensor]:
        return split_behind(starts, starts.diff() != tokens + 1)
