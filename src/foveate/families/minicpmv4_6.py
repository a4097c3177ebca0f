"""MiniCPM-V 4.6: an encoder that merges patches half-way, and a decoder of which most layers carry a state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layout import ImageLayout, Tile, joined
from . import register
from .base import Family


@register
class MiniCPMV46(Family):
    """The picture and its slices stand apart, between tokens of their own: each is an image of its own, or a frame."""

    model_type = "minicpmv4_6"
    summary = "MiniCPM-V 4.6 (slices of any size, linear attention in most layers)"
    examples = ("openbmb/MiniCPM-V-4_6",)

    frames_apart = True

    def encoder_layers(self, base: Any) -> list[Any]:
        # Those behind the merger, where a patch is what 2 x 2 were.
        return list(base.vision_tower.encoder.layers[base.config.vision_config.insert_layer_id + 1 :])

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in self.encoder_layers(base)[:-1]]

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        return self._pictures(config, inputs, inputs["target_sizes"])

    def video_token_id(self, config: Any) -> int:
        return config.video_token_id

    def video_layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        return self._pictures(config, inputs, inputs["target_sizes_videos"])

    def _pictures(self, config: Any, inputs: dict[str, Any], sizes: Any) -> list[ImageLayout]:
        merge, layouts, first = config.merge_kernel_size[0], [], 0
        merged = 1 if (inputs.get("downsample_mode") or config.downsample_mode) == "4x" else 2
        for height, width in (torch.as_tensor(sizes) // merged).tolist():
            patches = first + joined(height, width, merge)
            grid = (height // merge, width // merge)
            layouts.append(ImageLayout(len(patches), (Tile(torch.arange(len(patches)), grid, patches),)))
            first += height * width
        return layouts
