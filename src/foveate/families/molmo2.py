"""Molmo 2: a small whole picture, then crops at full size; image tokens see each other both ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

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

    def as_seen(self, base: Any, features: Tensor) -> Tensor:
        # Image features are added to what stands for the placeholder.
        token = torch.tensor([base.config.image_token_id], device=features.device)
        return features + base.get_input_embeddings()(token).to(features)

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        grids = [[(0, tuple(sizes[:2])), (0, tuple(sizes[2:]))] for sizes in inputs["image_grids"].tolist()]
        return _laid_out(inputs["image_token_pooling"], grids)

    def video_token_id(self, config: Any) -> int:
        return config.image_token_id

    def video_layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        films = inputs["video_grids"].tolist()
        grids = [[(frame, (rows, columns)) for frame in range(frames)] for frames, rows, columns in films]
        return _laid_out(inputs["video_token_pooling"], grids)


def _laid_out(pooling: Tensor, pictures: Sequence[Sequence[tuple[int, tuple[int, int]]]]) -> list[ImageLayout]:
    """pooling: (tokens, k) patches that join into each token, -1 for none. pictures: frame and grid of each tile."""
    pooling, layouts, first = pooling.flatten(0, -2).cpu(), [], 0
    # At an edge fewer patches join; there one of them stands for those that are missing.
    pooling = torch.where(pooling < 0, pooling.max(-1, keepdim=True).values, pooling)
    for grids in pictures:
        tiles, tokens = [], 0
        for frame, grid in grids:
            index = tokens + torch.arange(grid[0] * grid[1])
            tiles.append(Tile(index, grid, pooling[first + index], frame=frame))
            tokens += len(index)
        layouts.append(ImageLayout(tokens, tuple(tiles)))
        first += tokens
    return layouts
