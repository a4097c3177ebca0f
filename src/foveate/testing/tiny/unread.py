"""Families whose encoder shows no attention: convolutions, SAM, resamplers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AutoModel, MistralConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .base import IMAGE, LLM, PATCH, VISION, VISION_END, VISION_START, Tiny, noise
from .llava import SIDE, Llava, squares

UNREAD = ("fopru", "vtc_cls", "visionzip", "scope")


class Convolution(nn.Module):
    """In place of an encoder of timm, which is not here."""

    dtype = torch.float32

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, width, stride, stride)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        pixel_values = nn.functional.adaptive_avg_pool2d(pixel_values, SIDE)  # of any size
        return BaseModelOutputWithPooling(last_hidden_state=self.convolution(pixel_values))


class FastVlm(Llava):
    name, refused = "fast_vlm", UNREAD

    def options(self) -> dict[str, Any]:
        vision = dict(model_type="timm_wrapper", architecture="fastvit_mci3", do_pooling=False, num_classes=0)
        return dict(vision_config=vision, text_config=Qwen2Config(**LLM), image_token_index=IMAGE, image_seq_length=36)

    def make(self, config: PreTrainedConfig) -> PreTrainedModel:
        real, tower = AutoModel.from_config, Convolution(VISION["hidden_size"], SIDE // 6)
        config.vision_config.hidden_size = VISION["hidden_size"]

        def stand_in(part: Any, *args: Any, **kwargs: Any) -> Any:
            return tower if part is config.vision_config else real(part, *args, **kwargs)

        with patch.object(AutoModel, "from_config", stand_in):
            return super().make(config)


class GotOcr2(Llava):
    name, refused = "got_ocr2", UNREAD

    def options(self) -> dict[str, Any]:
        vision = dict(
            hidden_size=32,
            output_channels=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=64,
            patch_size=PATCH,
            mlp_dim=48,
            global_attn_indexes=[1, 2],
            window_size=4,
        )
        return dict(vision_config=vision, text_config=Qwen2Config(**LLM), image_token_id=IMAGE)

    def tokens(self, kind: int) -> int:
        return 16

    def pixels(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values": squares(kinds, rng, 64)}


class Aria(Llava):
    name, refused = "aria", UNREAD
    before, after = (VISION_START,), (VISION_END,)

    def options(self) -> dict[str, Any]:
        experts = dict(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
        return dict(
            vision_config=dict(model_type="idefics3_vision", **VISION, image_size=SIDE, patch_size=PATCH),
            text_config=dict(model_type="aria_text", **LLM, **experts),
            projector_patch_to_query_dict={36: 12},
            image_token_index=IMAGE,
        )

    def tokens(self, kind: int) -> int:
        return 12


class Idefics2(Tiny):
    name, refused, decoder = "idefics2", UNREAD, "text_model"
    before, after = (VISION_START,), (VISION_START,)

    def options(self) -> dict[str, Any]:
        perceiver = dict(resampler_n_latents=12, resampler_depth=2, resampler_n_heads=4, resampler_head_dim=16)
        return dict(
            vision_config=dict(**VISION, image_size=SIDE, patch_size=PATCH),
            perceiver_config=perceiver | dict(hidden_size=64, num_key_value_heads=2),
            text_config=MistralConfig(**LLM, sliding_window=None),
            image_token_id=IMAGE,
        )

    def tokens(self, kind: int) -> int:
        return 12

    def images(self, ids: Tensor, kinds: Sequence[Sequence[int]], rng: torch.Generator) -> dict[str, Tensor]:
        pixels = torch.zeros(len(kinds), max(map(len, kinds)), 3, SIDE, SIDE)
        for row, images in enumerate(kinds):
            pixels[row, : len(images)] = noise(rng, len(images), 3, SIDE, SIDE)
        return {"pixel_values": pixels, "pixel_attention_mask": (pixels[:, :, 0] != 0).long()}
