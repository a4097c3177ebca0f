"""What the families share whose image tokens are the answers of learned queries, and no part of the picture."""

from __future__ import annotations

from typing import Any

import torch

from ..layout import ImageLayout, Tile
from . import register
from .base import Family


class Queries(Family):
    """Every picture has as many tokens as there are queries, in a row that lies nowhere in it."""

    shows_attention = False

    def queries(self, config: Any, inputs: dict[str, Any]) -> int:
        """Tokens of a picture."""
        raise NotImplementedError  # every family behind this base says it

    def pictures(self, inputs: dict[str, Any]) -> int:
        """How many there are, without padding."""
        return len(inputs["pixel_values"])

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        index = torch.arange(self.queries(config, inputs))
        layout = ImageLayout(len(index), (Tile(index, (1, len(index)), index, None),))
        return [layout] * self.pictures(inputs)


@register
class Aria(Queries):
    """A resampler with as many queries as the configuration says for this number of patches."""

    model_type = "aria"
    summary = "Aria (a resampler: tokens are no part of the picture)"
    examples = ("rhymes-ai/Aria",)

    def queries(self, config: Any, inputs: dict[str, Any]) -> int:
        height, width = (edge // config.vision_config.patch_size for edge in inputs["pixel_values"].shape[-2:])
        return config.projector_patch_to_query_dict[height * width]


@register
class Idefics2(Queries):
    """A perceiver; pictures are padded to the sample with most of them."""

    model_type = "idefics2"
    summary = "Idefics2 (a perceiver: tokens are no part of the picture)"
    examples = ("HuggingFaceM4/idefics2-8b",)

    def decoder(self, base: Any) -> Any:
        return base.text_model

    def queries(self, config: Any, inputs: dict[str, Any]) -> int:
        return config.perceiver_config.resampler_n_latents

    def pictures(self, inputs: dict[str, Any]) -> int:
        # As the model tells them from padding.
        return int((inputs["pixel_values"].flatten(2) != 0).any(-1).sum())
