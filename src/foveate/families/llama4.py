"""Llama 4: tiles between separators, and decoder layers that see chunks of the prompt."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..layout import WHOLE, Box, Tile, grid_boxes
from . import register
from .squares import MarkedTiles, split_behind


@register
class Llama4(MarkedTiles):
    """The whole model receives the pixels, and its features are joined before the projector."""

    model_type = "llama4"
    summary = "Llama 4 (tiles, chunked attention)"
    examples = ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "meta-llama/Llama-4-Maverick-17B-128E-Instruct")
    features = "last_hidden_state"

    def base(self, model: Any) -> Any:
        return model

    def decoder(self, base: Any) -> Any:
        return base.language_model.model

    def as_seen(self, base: Any, features: Tensor) -> Tensor:
        return base.multi_modal_projector(features)

    def factor(self, config: Any) -> int:
        return round(1 / config.vision_config.pixel_shuffle_ratio)

    def encoder_layers(self, base: Any) -> list[Any]:
        return list(base.vision_model.model.layers)

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in self.encoder_layers(base)[:-1]]

    def square(self, config: Any, number: int, first: int, box: Box | None = WHOLE) -> Tile:
        tile = super().square(config, number, first, box)
        # [CLS] comes last, behind the patches of each picture.
        return Tile(tile.index, tile.grid, tile.patches + number, box)

    def boxes(self, row: Tensor, starts: Tensor, tokens: int, size: tuple[int, int] | None) -> list[Box | None]:
        tiles = starts[:-1]
        if not len(tiles):
            return [WHOLE]
        # One token separates the tiles of a row, and another one rows.
        behind = row[tiles + tokens]
        rows = split_behind(tiles, (behind == behind[-1])[:-1])
        return [*grid_boxes(len(rows), len(rows[0])), WHOLE]
