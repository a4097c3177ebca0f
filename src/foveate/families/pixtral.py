"""What the families share whose encoder is Pixtral's: all pictures in one sequence, any size, a mask between them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ..layout import ImageLayout, Tile, joined
from . import register
from .base import Family


class Pixtral(Family):
    """Every image is one grid of patches, of which merge x merge join into a token.

    Tokens that break rows stand between the image's, and are text. tower: name of the vision encoder.
    """

    tower: ClassVar[str] = "vision_tower"

    def merge(self, config: Any) -> int:
        """Patches along one side of a token."""
        return config.spatial_merge_size

    def encoder_layers(self, base: Any) -> list[Any]:
        return list(getattr(base, self.tower).transformer.layers)

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        return [layer.attention for layer in self.encoder_layers(base)[:-1]]

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        merge, patch, layouts, first = self.merge(config), config.vision_config.patch_size, [], 0
        # Pictures that come without their sizes are padded to no other's.
        sizes = inputs["image_sizes"] if "image_sizes" in inputs else [p.shape[-2:] for p in inputs["pixel_values"]]
        for height, width in torch.as_tensor(sizes).tolist():
            height, width = height // patch, width // patch
            patches = first + joined(height, width, merge)
            grid = (height // merge, width // merge)
            layouts.append(ImageLayout(len(patches), (Tile(torch.arange(len(patches)), grid, patches),)))
            first += height * width
        return layouts


@register
class Mistral3(Pixtral):
    """Pixtral's encoder, and patches that join."""

    model_type = "mistral3"
    summary = "Mistral Small 3.1 and later, Ministral 3"
    examples = ("mistralai/Mistral-Small-3.2-24B-Instruct-2506", "mistralai/Ministral-3-8B-Instruct-2512")


@register
class LightOnOcr(Pixtral):
    """The same in front of another decoder."""

    model_type = "lighton_ocr"
    summary = "LightOnOCR"
    examples = ("lightonai/LightOnOCR-2-1B", "lightonai/LightOnOCR-1B-1025")
    tower = "vision_encoder"
