"""LLaVA: 6 x 6 tokens an image; and other encoders and decoders in its architecture, as the hub has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig

from .base import IMAGE, LLM, PATCH, VISION, Tiny, clip, noise

SIDE = 24


def siglip(image_size: int, **options: Any) -> SiglipVisionConfig:
    """A SigLIP encoder."""
    return SiglipVisionConfig(**VISION, image_size=image_size, patch_size=PATCH, **options)


def squares(kinds: Sequence[int], rng: torch.Generator, side: int = SIDE) -> torch.Tensor:
    """One square picture each."""
    return torch.cat([noise(rng, 1, 3, side, side) for _ in kinds])


class Llava(Tiny):
    name, whole = "llava", True

    def options(self) -> dict[str, Any]:
        return dict(vision_config=clip(SIDE), text_config=LlamaConfig(**LLM), image_token_index=IMAGE)

    def tokens(self, kind: int) -> int:
        return 36

    def pixels(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values": squares(kinds, rng)}


class LlavaSiglip(Llava):
    name, variant = "llava_siglip", True

    def options(self) -> dict[str, Any]:
        return super().options() | dict(vision_config=siglip(SIDE), vision_feature_select_strategy="full")


class LlavaCls(Llava):
    """Hands its [CLS] token to the LLM as a 37th image token."""

    name, variant = "llava_cls", True

    def options(self) -> dict[str, Any]:
        return super().options() | dict(vision_feature_select_strategy="full")

    def tokens(self, kind: int) -> int:
        return 37


class LlavaMistral(Llava):
    name, variant = "llava_mistral", True

    def options(self) -> dict[str, Any]:
        return super().options() | dict(text_config=MistralConfig(**LLM, sliding_window=None))


class LlavaQwen2(Llava):
    name, variant = "llava_qwen2", True

    def options(self) -> dict[str, Any]:
        return super().options() | dict(text_config=Qwen2Config(**LLM))


class LlavaSliding(Llava):
    name, variant, window = "llava_sliding", True, 8

    def options(self) -> dict[str, Any]:
        return super().options() | dict(text_config=MistralConfig(**LLM, sliding_window=self.window))


class LlavaWindows(Llava):
    """Windows in every other layer."""

    name, variant, window = "llava_windows", True, 12

    def options(self) -> dict[str, Any]:
        kinds = ["sliding_attention", "full_attention"] * 2
        text = Qwen2Config(**LLM, use_sliding_window=True, sliding_window=self.window, layer_types=kinds)
        return super().options() | dict(text_config=text)
