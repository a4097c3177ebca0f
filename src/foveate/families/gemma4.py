"""Gemma 4: pictures of any size, padded to one number of patches, of which a square is pooled to a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layout import ImageLayout, Tile, as_clip, joined
from . import register
from .base import Family


@register
class Gemma4(Family):
    """Windows in most layers of the decoder; E models share keys and values between layers."""

    model_type = "gemma4"
    summary = "Gemma 4 (any resolution, sliding windows, shared KV layers)"
    examples = ("google/gemma-4-12b-it", "google/gemma-4-E4B-it")

    def encoder_layers(self, base: Any) -> list[Any]:
        return list(base.vision_tower.encoder.layers)

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in self.encoder_layers(base)[:-1]]

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        return self._pictures(config, inputs["image_position_ids"])

    def video_token_id(self, config: Any) -> int:
        return config.video_token_id

    def video_layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        frames = iter(self._pictures(config, inputs["video_position_ids"]))
        return [as_clip([next(frames) for _ in range(count)]) for count in inputs["num_frames_per_video"].tolist()]

    def _pictures(self, config: Any, positions: Tensor) -> list[ImageLayout]:
        factor, layouts = config.vision_config.pooling_kernel_size, []
        for picture, places in enumerate(positions.cpu()):
            # (column, row) of every patch, -1 at padding.
            width, height = (places.amax(0) + 1).tolist()
            real = (places >= 0).all(-1)
            at = torch.zeros(height, width, dtype=torch.long)
            at[places[real, 1], places[real, 0]] = real.nonzero()[:, 0]
            patches = picture * len(places) + at.flatten()[joined(height, width, factor)]
            grid = (height // factor, width // factor)
            layouts.append(ImageLayout(len(patches), (Tile(torch.arange(len(patches)), grid, patches),)))
        return layouts
