"""LFM2-VL: pictures of any size, padded to one number of patches, and convolutions in most layers of the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layout import ImageLayout, Tile, joined
from . import register
from .base import Family


@register
class Lfm2VL(Family):
    """Large pictures come as tiles, between tokens that name them: each is an image of its own."""

    model_type = "lfm2_vl"
    summary = "LFM2-VL (any resolution, convolutions in most layers)"
    examples = ("LiquidAI/LFM2-VL-1.6B", "LiquidAI/LFM2-VL-450M")

    def encoder_layers(self, base: Any) -> list[Any]:
        return list(base.vision_tower.encoder.layers)

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in self.encoder_layers(base)[:-1]]

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        factor, room, layouts = config.downsample_factor, inputs["pixel_values"].shape[1], []
        for picture, (height, width) in enumerate(inputs["spatial_shapes"].tolist()):
            patches = picture * room + joined(height, width, factor)
            grid = (height // factor, width // factor)
            layouts.append(ImageLayout(len(patches), (Tile(torch.arange(len(patches)), grid, patches),)))
        return layouts
