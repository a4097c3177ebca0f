"""LLaVA-OneVision: the tiles of LLaVA-NeXT, those of the larger pictures shrunk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from .base import IMAGE, LLM, PATCH, VIDEO
from .llava import siglip
from .llava_next import PINPOINTS, SIDE, SIZES, LlavaNext, film

LIMIT = "anyres_max_2"


class LlavaOnevision(LlavaNext):
    name, ends = "llava_onevision", 1

    def options(self) -> dict[str, Any]:
        return dict(
            vision_config=siglip(SIDE, vision_use_head=False),
            text_config=Qwen2Config(**LLM),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            vision_aspect_ratio=LIMIT,
        )

    def clip(self, kind: int) -> list[int]:
        return [4] * 3

    def film(self, kind: int) -> list[int]:
        return [VIDEO] * (sum(self.clip(kind)) + 1)  # and a newline

    def films(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values_videos": torch.stack([film(rng, 3, SIDE) for _ in kinds])}

    def tokens(self, kind: int) -> int:
        this = SimpleNamespace(
            image_processor=SimpleNamespace(image_grid_pinpoints=PINPOINTS),
            vision_aspect_ratio=LIMIT,
            num_image_tokens=(SIDE // PATCH) ** 2,
            vision_feature_select_strategy="full",
            patch_size=PATCH,
        )
        this._get_unpadded_features = partial(LlavaOnevisionProcessor._get_unpadded_features, this)
        return LlavaOnevisionProcessor._get_number_of_features(this, *SIZES[kind], SIDE, SIDE)
