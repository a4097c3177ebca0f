"""GLM with vision, in four sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import BREAK, IMAGE, LLM, MARK, PATCH, VIDEO, VISION_END, VISION_START
from .qwen2_5_vl import Grid, mrope

VISION = dict(
    depth=3, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=PATCH, image_size=48, out_hidden_size=64
)


class Glm4v(Grid):
    name = "glm4v"

    def text(self) -> dict[str, Any]:
        return dict(rope_parameters=mrope(1, 1, 2, partial_rotary_factor=0.5))

    mixes = False  # transformers tells frames and images apart by no id

    def film(self, kind: int) -> list[int]:
        """A frame at a time, each between marks and followed by when it is shown."""
        frames = [[VISION_START, *[VIDEO] * n, VISION_END, 3 + i] for i, n in enumerate(self.clip(kind))]
        return [BREAK, *(token for frame in frames for token in frame), MARK]

    def padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        batch = super().padded(rows)
        return batch | {"input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == VIDEO, IMAGE)}

    def options(self) -> dict[str, Any]:
        return dict(
            vision_config=VISION,
            text_config=LLM | self.text(),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_start_token_id=VISION_START,
            image_end_token_id=VISION_END,
            video_start_token_id=BREAK,
            video_end_token_id=MARK,
        )


class Glm4vMoe(Glm4v):
    name = "glm4v_moe"

    def text(self) -> dict[str, Any]:
        experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1)
        return super().text() | experts | dict(head_dim=16, moe_intermediate_size=32, first_k_dense_replace=1)


class Glm46v(Glm4v):
    name = "glm46v"

    def text(self) -> dict[str, Any]:
        return super().text() | dict(model_type="glm4v_text")

    def options(self) -> dict[str, Any]:
        return super().options() | dict(vision_config=VISION | dict(model_type="glm4v_vision"))


class GlmOcr(Glm4v):
    name = "glm_ocr"

    def text(self) -> dict[str, Any]:
        return dict(head_dim=16, rope_parameters=mrope(2, 3, 3, partial_rotary_factor=1.0))
