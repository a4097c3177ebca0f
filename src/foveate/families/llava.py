"""LLaVA 1.5 and its kin: one square picture, a CLIP-style encoder, an MLP projector, any decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import register
from .base import Family, ImageLayout, Tile


@register
class Llava(Family):
    """Every image is one grid of patches; with the "full" strategy a leading [CLS] token is pinned."""

    model_type = "llava"
    summary = "LLaVA 1.5 and models of its architecture (CLIP or SigLIP encoder)"
    examples = ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf")

    def check(self, base: Any) -> str | None:
        if not hasattr(base.vision_tower, "encoder"):
            kind = base.config.vision_config.model_type
            return f"its vision encoder {kind!r} lays image tokens out in a way foveate does not know"
        if base.config.vision_feature_select_strategy == "default" and not self.prefix_tokens(base):
            return (
                'vision_feature_select_strategy "default" drops a [CLS] token that its vision encoder does not have; '
                'set it to "full"'
            )
        return None

    def side(self, base: Any) -> int:
        """Patches along one side of the encoder's picture."""
        vision = base.config.vision_config
        return vision.image_size // vision.patch_size

    def prefix_tokens(self, base: Any) -> int:
        return int(hasattr(base.vision_tower.embeddings, "class_embedding"))

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in base.vision_tower.encoder.layers[:-1]]

    def projector(self, base: Any) -> nn.Module:
        return base.multi_modal_projector

    def encoder_states(self, base: Any, states: Tensor) -> Tensor:
        # With the "full" strategy [CLS] comes first.
        return states[:, states.shape[1] - self.side(base) ** 2 :].flatten(0, 1)

    def layouts(self, base: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        side, cls = self.side(base), 0
        strategy = inputs.get("vision_feature_select_strategy") or base.config.vision_feature_select_strategy
        if strategy == "full":
            cls = self.prefix_tokens(base)
        elif not self.prefix_tokens(base):
            raise ValueError('"default" drops a [CLS] token that this vision encoder does not have')
        patches = torch.arange(side * side)
        return [
            ImageLayout(cls + side * side, (Tile(cls + patches, (side, side), picture * side * side + patches),))
            for picture in range(len(inputs["pixel_values"]))
        ]
