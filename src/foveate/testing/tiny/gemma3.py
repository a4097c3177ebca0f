"""Gemma 3: 3 x 3 tokens an image."""

from __future__ import annotations

from typing import Any

from .base import IMAGE, LLM, VISION_END, VISION_START
from .llava import SIDE, Llava, siglip


class Gemma3(Llava):
    name, model_type, whole = "gemma3", "gemma3", False
    before, after, types, window = (VISION_START,), (VISION_END,), ("token_type_ids",), 12
    both_ways = True

    def options(self) -> dict[str, Any]:
        kinds = ["sliding_attention", "full_attention"] * 2
        text = dict(**LLM, head_dim=16, query_pre_attn_scalar=16, sliding_window=self.window, layer_types=kinds)
        tokens = dict(image_token_index=IMAGE, boi_token_index=VISION_START, eoi_token_index=VISION_END)
        vision = siglip(SIDE, vision_use_head=False)
        return dict(vision_config=vision, text_config=text, mm_tokens_per_image=9, **tokens)

    def tokens(self, kind: int) -> int:
        return 9
