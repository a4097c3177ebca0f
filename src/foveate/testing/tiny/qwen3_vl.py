"""Qwen3-VL: features of three encoder layers join the first three layers of the decoder."""

from __future__ import annotations

from typing import Any

from .base import LLM, PATCH, VIDEO, VISION_END, VISION_START
from .qwen2_5_vl import TOKENS, Grid, mrope

VISION = dict(
    depth=4,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    patch_size=PATCH,
    out_hidden_size=64,
    num_position_embeddings=144,
)


class Stamped(Grid):
    """Films are written a frame at a time, each behind when it is shown."""

    def film(self, kind: int) -> list[int]:
        frames = [[3 + i, VISION_START, *[VIDEO] * n, VISION_END] for i, n in enumerate(self.clip(kind))]
        return [token for frame in frames for token in frame]


class Qwen3VL(Stamped):
    name = "qwen3_vl"

    def options(self) -> dict[str, Any]:
        vision = VISION | dict(deepstack_visual_indexes=[0, 1, 2])
        text = dict(num_hidden_layers=5, head_dim=16, rope_parameters=mrope(2, 3, 3, mrope_interleaved=True))
        return dict(vision_config=vision, text_config=LLM | text, **TOKENS)


class Qwen3VLMoe(Qwen3VL):
    name = "qwen3_vl_moe"

    def options(self) -> dict[str, Any]:
        options = super().options()
        experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
        return options | dict(text_config=options["text_config"] | experts)
