"""PaliGemma 1 and 2: 6 x 6 tokens an image, in front of the words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Config, GemmaConfig, PreTrainedConfig

from .base import IMAGE, LLM
from .llava import SIDE, Llava, siglip


class PaliGemma(Llava):
    name, model_type, first, both_ways = "paligemma", "paligemma", 0, True

    def text(self) -> PreTrainedConfig:
        return GemmaConfig(**LLM, head_dim=16)

    def options(self) -> dict[str, Any]:
        vision = siglip(SIDE, vision_use_head=False)
        return dict(vision_config=vision, text_config=self.text(), image_token_index=IMAGE, projection_dim=64)

    def inputs(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        batch = super().inputs(*args, **kwargs)
        return batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}  # all of it a prompt


class PaliGemma2(PaliGemma):
    name, variant, window, backends = "paligemma2", True, 16, ("eager",)

    def text(self) -> PreTrainedConfig:
        return Gemma2Config(**LLM, head_dim=16, query_pre_attn_scalar=16, sliding_window=self.window)
