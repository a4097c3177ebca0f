"""ERNIE 4.5 VL: text and images have experts of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .base import BREAK, IMAGE, LLM, MARK, PATCH, VIDEO, VISION_END, VISION_START, moving
from .qwen2_5_vl import Grid, mrope

FILMS = [(6, 8, 12), (4, 8, 8), (8, 12, 8), (4, 8, 12)]  # two pictures join into a frame


class Ernie(Grid):
    name = "ernie4_5_vl_moe"
    types = ("mm_token_type_ids", "moe_mm_token_type_ids")
    values = 3 * PATCH**2

    def clip(self, kind: int) -> list[int]:
        t, h, w = FILMS[kind]
        return [h * w // 4] * (t // 2)

    def film(self, kind: int) -> list[int]:
        return [BREAK, *[VIDEO] * sum(self.clip(kind)), MARK]

    def films(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        grids = torch.tensor([FILMS[k] for k in kinds])
        patches = [moving(t, h * w, self.values, rng) for t, h, w in grids.tolist()]
        return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": grids}

    def options(self) -> dict[str, Any]:
        experts = dict(moe_intermediate_size=[32, 16], moe_k=2, moe_num_experts=4, moe_num_shared_experts=1)
        return dict(
            vision_config=dict(depth=3, hidden_size=32, num_heads=2, patch_size=PATCH, intermediate_size=48),
            text_config=LLM | experts | dict(rope_parameters=mrope(3, 3, 2)),
            image_start_token_id=VISION_START,
            image_end_token_id=VISION_END,
            image_token_id=IMAGE,
            video_start_token_id=BREAK,
            video_end_token_id=MARK,
            video_token_id=VIDEO,
        )

    def go_on(self, model: PreTrainedModel, batch: dict, turn: dict, length: int, image: bool) -> dict[str, Tensor]:
        turn = super().go_on(model, batch, turn, length, image)
        types = turn["moe_mm_token_type_ids"]  # of the tokens that are no part of the cache, as one of the last turn is
        return turn | {"moe_mm_token_type_ids": torch.nn.functional.pad(types, (1, 0))}
