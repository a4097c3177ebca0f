"""Families whose images are one square each: ViP-LLaVA, DeepSeek-VL, Janus, Ovis2 and Video-LLaVA."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationMixin,
    JanusForConditionalGeneration,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    VideoLlavaForConditionalGeneration,
    VideoLlavaModel,
)

from .base import IMAGE, LLM, MARK, PATCH, VIDEO, VISION, VISION_END, VISION_START, VOCAB, clip
from .llava import SIDE, Llava, siglip, squares
from .llava_next import film


class VipLlava(Llava):
    name = "vipllava"

    def options(self) -> dict[str, Any]:
        layers = dict(vision_feature_layers=[-2, -1])
        return dict(vision_config=clip(SIDE), text_config=LlamaConfig(**LLM), image_token_index=IMAGE, **layers)


class DeepseekVL(Llava):
    name = "deepseek_vl"

    def options(self) -> dict[str, Any]:
        vision = siglip(SIDE, vision_use_head=False)
        return dict(vision_config=vision, text_config=LlamaConfig(**LLM), image_token_id=IMAGE)


class Janus(Llava):
    name = "janus"

    def make(self, config: PreTrainedConfig) -> PreTrainedModel:
        return JanusForConditionalGeneration(config)

    def options(self) -> dict[str, Any]:
        vision = {name: size for name, size in VISION.items() if name != "intermediate_size"}
        vision |= dict(
            mlp_ratio=1.5, image_size=SIDE, patch_size=PATCH, projection_dim=64, num_image_tokens=36, depth=2
        )
        drawing = dict(
            embed_dim=8,
            num_embeddings=16,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            latent_channels=8,
            num_patches=16,
            image_token_embed_dim=64,
            projection_dim=64,
        )
        return dict(text_config=LlamaConfig(**LLM), vision_config=vision, vq_config=drawing, image_token_id=IMAGE)

    def replay(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        return GenerationMixin.generate(model, **kwargs)  # its own takes no logits processor


class Ovis2(Llava):
    name, before, after = "ovis2", (VISION_START,), (VISION_END,)

    def options(self) -> dict[str, Any]:
        vision = dict(**VISION, image_size=SIDE, patch_size=PATCH, vocab_size=32, num_visual_indicator_tokens=3)
        return dict(
            vision_config=vision | dict(hidden_stride=2),
            text_config=Qwen2Config(**LLM),
            image_token_id=IMAGE,
            visual_indicator_token_ids=[MARK, VISION_START, VISION_END],
            hidden_size=64,
            vocab_size=VOCAB,
        )

    def tokens(self, kind: int) -> int:
        return 9


class VideoLlava(Llava):
    name, heads = "video_llava", 1

    def options(self) -> dict[str, Any]:
        parts = dict(vision_config=clip(SIDE), text_config=LlamaConfig(**LLM), image_token_index=IMAGE)
        return parts | dict(video_token_index=VIDEO, vision_feature_select_strategy="full")

    def make(self, config: PreTrainedConfig) -> PreTrainedModel:
        return VideoLlavaForConditionalGeneration(config)

    def tokens(self, kind: int) -> int:
        return 37

    def pixels(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        known = inspect.signature(VideoLlavaModel.forward).parameters
        return {"pixel_values" if "pixel_values" in known else "pixel_values_images": squares(kinds, rng)}

    def clip(self, kind: int) -> list[int]:
        return [36] * 3

    def film(self, kind: int) -> list[int]:
        return [VIDEO] * (3 * 37)  # [CLS] comes with every frame

    def films(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values_videos": torch.stack([film(rng, 3, SIDE) for _ in kinds])}
