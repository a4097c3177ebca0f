"""Qwen2.5-VL, and what the families share whose images and videos are grids of patches merged 2 x 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .base import IMAGE, LLM, PATCH, VIDEO, VISION_END, VISION_START, Tiny, moving

GRIDS = [(1, 8, 12), (1, 12, 8), (1, 12, 12), (1, 8, 4)]  # (t, h, w) in patches
FILMS = [(3, 8, 12), (5, 8, 8), (2, 12, 8), (4, 8, 12)]
TOKENS = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END
)


def mrope(*sections: int, **more: Any) -> dict:
    """Positions in three parts: time, height and width."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}


class Grid(Tiny):
    """Images of any size. values: numbers a patch comes as."""

    before, after = (VISION_START,), (VISION_END,)
    types: tuple[str, ...] = ("mm_token_type_ids",)
    values = 3 * 2 * PATCH**2

    def tokens(self, kind: int) -> int:
        t, h, w = GRIDS[kind]
        return t * h * w // 4

    def pixels(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        grids = torch.tensor([GRIDS[k] for k in kinds])
        patches = [torch.randn(n, self.values, generator=rng) for n in grids.prod(1).tolist()]
        return {"pixel_values": torch.cat(patches), "image_grid_thw": grids}

    def clip(self, kind: int) -> list[int]:
        t, h, w = FILMS[kind]
        return [t * h * w // 4 // t] * t

    def film(self, kind: int) -> list[int]:
        frames = self.clip(kind)
        return [*self.before, *[VIDEO] * sum(frames), *self.after]

    def films(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        grids = torch.tensor([FILMS[k] for k in kinds])
        patches = [moving(t, h * w, self.values, rng) for t, h, w in grids.tolist()]
        return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": grids}

    def go_on(self, model: PreTrainedModel, batch: dict, turn: dict, length: int, image: bool) -> dict[str, Tensor]:
        types = turn.pop("mm_token_type_ids", None)
        if image and types is not None:
            # transformers wants the grids of the whole talk for positions, of the new image for features
            pad = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, length - batch["input_ids"].shape[1]))
            old = batch.get("image_grid_thw", turn["image_grid_thw"][:0])
            per_row = (batch["input_ids"] == (VISION_START if len(old) else -1)).sum(1).tolist()
            grids = zip(old.split(per_row), turn["image_grid_thw"].split(1), strict=True)
            vision, _ = model.model.get_rope_index(
                turn["input_ids"],
                torch.cat([pad, types], 1),
                torch.cat([grid for row in grids for grid in row]),
                batch.get("video_grid_thw"),
                attention_mask=turn["attention_mask"],
            )
            text = turn["attention_mask"].cumsum(1) - 1
            turn["position_ids"] = torch.cat([text.clamp(min=0)[None], vision])
        return turn


class Qwen2_5_VL(Grid):
    name, whole = "qwen2_5_vl", True

    def options(self) -> dict[str, Any]:
        vision = dict(
            depth=4,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            patch_size=PATCH,
            window_size=16,  # windows of 2 x 2 merged tokens, of 4 x 4 patches
            fullatt_block_indexes=[1, 3],
            out_hidden_size=LLM["hidden_size"],
        )
        text = {**LLM, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
        return dict(vision_config=vision, text_config=text, **TOKENS)
