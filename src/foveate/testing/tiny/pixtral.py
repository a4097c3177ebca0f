"""Pixtral's encoder, which packs pictures of any size: Mistral Small 3 and LightOnOCR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import MistralConfig, PixtralVisionConfig, Qwen3Config

from .base import BREAK, IMAGE, LLM, MARK, PATCH, VISION, Tiny, noise

SIZES = [(24, 40), (40, 24), (32, 32), (24, 16)]  # (height, width)


class Packed(Tiny):
    """merge: patches along one side of a token."""

    merge = 2

    def grid(self, kind: int) -> tuple[int, int]:
        height, width = SIZES[kind]
        return height // PATCH // self.merge, width // PATCH // self.merge

    def tokens(self, kind: int) -> int:
        rows, columns = self.grid(kind)
        return rows * columns

    def image(self, kind: int) -> list[int]:
        rows, columns = self.grid(kind)
        return [*[*[IMAGE] * columns, BREAK] * (rows - 1), *[IMAGE] * columns, MARK]

    def pixels(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        sizes = [SIZES[kind] for kind in kinds]
        pixels = torch.zeros(len(sizes), 3, *(max(side) for side in zip(*sizes, strict=True)))
        for picture, (height, width) in zip(pixels, sizes, strict=True):
            picture[:, :height, :width] = noise(rng, 3, height, width)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}

    def vision(self) -> PixtralVisionConfig:
        return PixtralVisionConfig(**VISION, image_size=64, patch_size=PATCH)


class Mistral3(Packed):
    name = "mistral3"

    def options(self) -> dict[str, Any]:
        text = MistralConfig(**LLM, head_dim=16, sliding_window=None)
        merge = dict(spatial_merge_size=self.merge)
        return dict(vision_config=self.vision(), text_config=text, image_token_index=IMAGE, **merge)


class LightOnOcr(Packed):
    name = "lighton_ocr"

    def options(self) -> dict[str, Any]:
        text = Qwen3Config(**LLM, head_dim=16)
        merge = dict(spatial_merge_size=self.merge)
        return dict(vision_config=self.vision(), text_config=text, image_token_id=IMAGE, **merge)


class Pixtral12B(Packed):
    name, model_type, variant, merge = "pixtral", "llava", True, 1

    def options(self) -> dict[str, Any]:
        text = MistralConfig(**LLM, head_dim=16, sliding_window=None)
        strategy = dict(vision_feature_select_strategy="full", vision_feature_layer=-1)
        return dict(vision_config=self.vision(), text_config=text, image_token_index=IMAGE, **strategy)
