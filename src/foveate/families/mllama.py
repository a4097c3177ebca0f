"""Llama-3.2-Vision: image features reach the decoder through cross-attention layers only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import Tile, grid_boxes
from . import register
from .base import Family


@register
class Mllama(Family):
    """No image tokens in the prompt: the features of all tiles are keys of a few cross-attention layers."""

    model_type = "mllama"
    summary = "Llama-3.2-Vision (cross-attention to tiles of image features)"
    examples = ("meta-llama/Llama-3.2-11B-Vision-Instruct",)
    places = frozenset({"cross"})

    def tile_features(self, config: Any) -> int:
        """Features of a tile: its patches and a [CLS]."""
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1

    def features_per_image(self, config: Any) -> int:
        return config.vision_config.max_num_tiles * self.tile_features(config)

    def feature_places(self, config: Any, inputs: dict[str, Any]) -> list[list[tuple[Tensor, tuple[Tile, ...]]]]:
        ratios, mask = inputs.get("aspect_ratio_ids"), inputs.get("cross_attention_mask")
        if ratios is None:
            return []
        vision, size = config.vision_config, self.features_per_image(config)
        side, n = vision.image_size // vision.patch_size, self.tile_features(config)
        patches = 1 + torch.arange(side * side)  # the first feature of a tile is its [CLS]
        samples = []
        for row, sample in enumerate(ratios.tolist()):
            # The mask has columns for the images of earlier turns, too; the new ones come last.
            seen = None if mask is None else mask[row].any(0)
            earlier = 0 if seen is None else len(seen) - len(sample)
            images = []
            for slot, ratio in enumerate(sample, start=earlier):
                rows, columns = vision.supported_aspect_ratios[max(ratio, 1) - 1]
                real = torch.arange(vision.max_num_tiles) < rows * columns if seen is None else seen[slot].cpu() > 0
                tiles = []
                for t, box in enumerate(grid_boxes(rows, columns)):
                    tiles.append(Tile(t * n + patches, (side, side), t * n + patches, box))
                if real.any():
                    images.append((slot * size + real.repeat_interleave(n).nonzero()[:, 0], tuple(tiles)))
            samples.append(images)
        return samples
