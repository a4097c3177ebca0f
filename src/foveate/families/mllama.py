"""Llama-3.2-Vision: image features reach the decoder through cross-attention layers only."""

from __future__ import annotations

from typing import Any

import torch

from . import register
from .base import Family, Tile


@register
class Mllama(Family):
    """No image tokens in the prompt: the features of all tiles are keys of a few cross-attention layers."""

    model_type = "mllama"
    summary = "Llama-3.2-Vision (cross-attention to tiles of image features)"
    examples = ("meta-llama/Llama-3.2-11B-Vision-Instruct",)
    places = frozenset({"cross"})

    def features_per_image(self, base: Any) -> int:
        return base.config.vision_config.max_num_tiles * base.vision_model.num_patches

    def feature_tiles(self, base: Any, inputs: dict[str, Any]) -> list[list[tuple[Tile, ...]]]:
        vision = base.config.vision_config
        side, n = vision.image_size // vision.patch_size, base.vision_model.num_patches
        patches = 1 + torch.arange(side * side)  # the first feature of a tile is its [CLS]
        images: list[list[tuple[Tile, ...]]] = []
        for sample in inputs["aspect_ratio_ids"].tolist():
            images.append([])
            for ratio in sample:
                rows, columns = vision.supported_aspect_ratios[max(ratio, 1) - 1]
                tiles = []
                for t, (y, x) in enumerate((y, x) for y in range(rows) for x in range(columns)):
                    box = (x / columns, y / rows, (x + 1) / columns, (y + 1) / rows)
                    tiles.append(Tile(t * n + patches, (side, side), t * n + patches, box))
                images[-1].append(tuple(tiles))
        return images
