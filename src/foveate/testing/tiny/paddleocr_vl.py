"""PaddleOCR-VL: patches come as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import LLM, PATCH, VISION
from .qwen2_5_vl import TOKENS, Grid, mrope


class PatchPictures(Grid):
    values = 3 * PATCH**2

    def pixels(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        pixels = super().pixels(kinds, rng)
        return pixels | {"pixel_values": pixels["pixel_values"].view(-1, 3, PATCH, PATCH)}


class PaddleOcrVL(PatchPictures):
    name = "paddleocr_vl"

    def options(self) -> dict[str, Any]:
        vision = dict(**VISION, image_size=48, patch_size=PATCH)
        text = {**LLM, "head_dim": 16, "rope_parameters": mrope(2, 3, 3)}
        return dict(vision_config=vision, text_config=text, **TOKENS)

    def clip(self, kind: int) -> list[int]:
        return []  # transformers gives it no videos
