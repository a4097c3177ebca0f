"""Qwen2-VL."""

from __future__ import annotations

from typing import Any

from .base import LLM, PATCH
from .qwen2_5_vl import TOKENS, Grid, mrope


class Qwen2VL(Grid):
    name = "qwen2_vl"

    def options(self) -> dict[str, Any]:
        vision = dict(depth=4, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=PATCH)
        return dict(vision_config=vision, text_config={**LLM, "rope_parameters": mrope(2, 3, 3)}, **TOKENS)
