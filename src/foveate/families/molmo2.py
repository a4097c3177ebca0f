"""Molmo 2: a small whole picture, then crops at full size; image tokens see each other both ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layout import ImageLayout, Tile
from . import register
from .base import Family


@register
class Molmo2(Family):
    """The processor says which patches join into each token, overlaps of the crops taken out."""

    model_type = "molmo2"
    summary = "Molmo 2 (a small picture and crops, images seen both ways)"
    examples = ("allenai/Molmo2-4B", "allenai/Molmo2-8B")

    def encoder_layers(self, base: Any) -> list[Any]:
        layers = list(base.vision_tower.layers)
        return layers[: max(at % (len(layers) + 1) for at in base.config.adapter_config.vision_feature_layer)]

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in self.encoder_layers(base)[:-1]]

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        pooling, layouts, first = inputs["image_token_pooling"].flatten(0, -2).cpu(), [], 0
        # At an edge fewer patches join; there one of them stands for those that are missing.
        pooling = torch.where(pooling < 0, pooling.max(-1, keepdim=True).values, pooling)
        for sizes in inputs["image_grids"].tolist():
            tiles, tokens = [], 0
            for grid in (tuple(sizes[:2]), tuple(sizes[2:])):
                index = tokens + torch.arange(grid[0] * grid[1])
                tiles.append(Tile(index, grid, pooling[first + index]))
                tokens += len(index)
            layouts.append(ImageLayout(tokens, tuple(tiles)))
            first += tokens
        return layouts
