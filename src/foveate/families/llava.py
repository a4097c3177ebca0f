"""LLaVA 1.5 and its kin: one square picture, a CLIP-style encoder, an MLP projector, any decoder."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layout import ImageLayout, Tile
from . import register
from .base import Family
from .pixtral import Pixtral


@register
class Llava(Family):
    """Every image is one grid of patches; with the "full" strategy a leading [CLS] token is pinned."""

    model_type = "llava"
    summary = "LLaVA 1.5 and models of its architecture (CLIP, SigLIP or Pixtral encoder)"
    examples: ClassVar[tuple[str, ...]] = (
        "llava-hf/llava-1.5-7b-hf",
        "llava-hf/llava-1.5-13b-hf",
        "mistral-community/pixtral-12b",
    )

    def of(self, config: Any) -> Family:
        return Pixtral12B() if config.vision_config.model_type == "pixtral" else self

    def check(self, base: Any) -> str | None:
        tower, kind = base.vision_tower, base.config.vision_config.model_type
        known = any(name in kind for name in ("clip", "siglip"))
        has_cls = hasattr(getattr(tower, "embeddings", None), "class_embedding")
        if not known or not hasattr(tower, "encoder") or self.prefix_tokens(base.config) != has_cls:
            return f"its vision encoder {kind!r} lays image tokens out in a way foveate does not know"
        if base.config.vision_feature_select_strategy == "default" and not has_cls:
            return (
                'vision_feature_select_strategy "default" drops a [CLS] token that its vision encoder does not have; '
                'set it to "full"'
            )
        return None

    def side(self, config: Any) -> int:
        return config.vision_config.image_size // config.vision_config.patch_size

    def prefix_tokens(self, config: Any) -> int:
        # CLIP and its kin have a [CLS] token, SigLIP has none; `check` compares this with the model.
        return int("clip" in config.vision_config.model_type)

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in base.vision_tower.encoder.layers[:-1]]

    def encoder_layers(self, base: Any) -> list[nn.Module]:
        layers, feature = base.vision_tower.encoder.layers, base.config.vision_feature_layer
        # Of several layers joined, the deepest.
        deepest = max(at % (len(layers) + 1) for at in ([feature] if isinstance(feature, int) else feature))
        return list(layers[:deepest])

    def keys_and_values(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        return layer.self_attn.k_proj, layer.self_attn.v_proj

    def carry(self, layer: Any, readers: Tensor, key: Tensor, value: Tensor) -> Tensor:
        own, attention = layer.layer_norm1(readers), layer.self_attn
        query, key, value = (
            part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for part in (
                attention.q_proj(own),
                torch.cat([key, attention.k_proj(own)], 1),
                torch.cat([value, attention.v_proj(own)], 1),
            )
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, scale=attention.scale)
        readers = readers + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        return readers + layer.mlp(layer.layer_norm2(readers))

    def projector(self, base: Any) -> nn.Module:
        return base.multi_modal_projector

    def encoder_states(self, base: Any, states: Tensor) -> Tensor:
        # With the "full" strategy [CLS] comes first.
        return states[:, states.shape[1] - self.side(base.config) ** 2 :].flatten(0, 1)

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        side, cls = self.side(config), 0
        strategy = inputs.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
        if strategy == "full":
            cls = self.prefix_tokens(config)
        elif not self.prefix_tokens(config):
            raise ValueError('"default" drops a [CLS] token that this vision encoder does not have')
        patches = torch.arange(side * side)
        return [
            ImageLayout(cls + side * side, (Tile(cls + patches, (side, side), picture * side * side + patches),))
            for picture in range(len(inputs["pixel_values"]))
        ]


class Pixtral12B(Pixtral):
    """Pixtral's encoder behind a "llava" model: a token for every patch."""

    model_type = "llava"
    summary = Llava.summary
    examples = ("mistral-community/pixtral-12b",)

    def merge(self, config: Any) -> int:
        return 1
