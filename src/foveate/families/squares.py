"""What the families share whose encoder sees every picture as one square of patches, which may join into tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ..layout import WHOLE, Box, ImageLayout, Tile, joined
from .base import Family


def first_of(size: Any) -> int:
    """A size of squares, which some configurations write twice."""
    return size if isinstance(size, int) else size[0]


class Squares(Family):
    """Every image is one square, of which factor x factor patches join into a token.

    tower: name of the vision encoder, with its layers in an `encoder`.
    """

    tower: ClassVar[str] = "vision_tower"

    def factor(self, config: Any) -> int:
        """Patches along one side of a token."""
        return 1

    def side(self, config: Any) -> int:
        vision = config.vision_config
        return first_of(vision.image_size) // first_of(vision.patch_size)

    def encoder_layers(self, base: Any) -> list[Any]:
        return list(getattr(base, self.tower).encoder.layers)

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in self.encoder_layers(base)[:-1]]

    def square(self, config: Any, number: int, first: int = 0, box: Box = WHOLE) -> Tile:
        """The tile that the encoder saw as picture `number`, its tokens from `first` on."""
        side, factor = self.side(config), self.factor(config)
        patches = number * side**2 + joined(side, side, factor)
        return Tile(first + torch.arange(len(patches)), (side // factor, side // factor), patches, box)

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        tiles = [self.square(config, number) for number in range(len(inputs["pixel_values"]))]
        return [ImageLayout(len(tile.index), (tile,)) for tile in tiles]
