"""What the families share whose encoder is Pixtral's: all pictures in one sequence, any size, a mask between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layout import ImageLayout, Tile, joined
from .base import Family


class Pixtral(Family):
    """Every image is one grid of patches, of which merge x merge join into a token.

    Tokens that break rows stand between the image's, and are text.
    """

    def merge(self, config: Any) -> int:
        """Patches along one side of a token."""
        return config.spatial_merge_size

    def encoder_layers(self, base: Any) -> list[Any]:
        return list(base.vision_tower.transformer.layers)

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        return [layer.attention for layer in self.encoder_layers(base)[:-1]]

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        merge, patch, layouts, first = self.merge(config), config.vision_config.patch_size, [], 0
        for height, width in torch.as_tensor(inputs["image_sizes"]).tolist():
            height, width = height // patch, width // patch
            patches = first + joined(height, width, merge)
            grid = (height // merge, width // merge)
            layouts.append(ImageLayout(len(patches), (Tile(torch.arange(len(patches)), grid, patches),)))
            first += height * width
        return layouts
