"""Molmo 2: 2 x 2 tokens of a small whole picture, and those of crops of 4 x 4 patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import IMAGE, LLM, MARK, PATCH, VISION, VISION_END, VISION_START, Tiny, moving

GRIDS = [(2, 4), (4, 2), (4, 4), (2, 2)]  # (rows, columns) of tokens at full size, 2 x 2 a crop
FRAMES = [3, 5, 2, 4]
SIDE = 4
JOINED = torch.arange(SIDE**2).view(2, 2, 2, 2).transpose(1, 2).reshape(-1, 4)


class Molmo2(Tiny):
    name, types, both_ways = "molmo2", ("mm_token_type_ids",), True
    mixes = False  # transformers takes images or videos

    def options(self) -> dict[str, Any]:
        vision = dict(**VISION, num_key_value_heads=4, head_dim=8, image_size=[16, 16], patch_size=PATCH)
        adapter = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8, intermediate_size=48)
        return dict(
            vision_config=vision | {"num_position_embeddings": SIDE**2},
            adapter_config=adapter | {"vision_feature_layer": [-1, -2], "text_hidden_size": LLM["hidden_size"]},
            text_config=dict(**LLM, head_dim=16, additional_vocab_size=0),
            image_patch_id=IMAGE,
            image_start_token_id=VISION_START,
            image_end_token_id=VISION_END,
            low_res_image_start_token_id=VISION_START,
            frame_start_token_id=90,
            frame_end_token_id=MARK,
        )

    def tokens(self, kind: int) -> int:
        rows, columns = GRIDS[kind]
        return 4 + rows * columns

    def image(self, kind: int) -> list[int]:
        rows, columns = GRIDS[kind]
        small, large = ([*[IMAGE] * c, MARK] * r for r, c in ((2, 2), (rows, columns)))
        return [VISION_START, *small, VISION_END, VISION_START, *large, VISION_END]

    def clip(self, kind: int) -> list[int]:
        return [4] * FRAMES[kind]

    def film(self, kind: int) -> list[int]:
        """A frame at a time, each behind when it is shown."""
        frames = [[3 + i, 90, *[IMAGE] * n, MARK] for i, n in enumerate(self.clip(kind))]
        return [token for frame in frames for token in frame]

    def films(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        counts = [FRAMES[kind] for kind in kinds]
        crops = [moving(n, SIDE**2, 3 * PATCH**2, rng).unflatten(0, (n, -1)) for n in counts]
        numbers = torch.arange(sum(counts)).view(-1, 1, 1) * SIDE**2 + JOINED
        grids = torch.tensor([[n, 2, 2] for n in counts])
        return {
            "pixel_values_videos": torch.cat(crops),
            "video_token_pooling": numbers.flatten(0, 1),
            "video_grids": grids,
        }

    def beside(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
        seen = one["pixel_values"].shape[:2].numel()
        pooling = other["image_token_pooling"]
        return super().beside(one, other | {"image_token_pooling": pooling.where(pooling < 0, pooling + seen)})

    def pixels(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        crops, pooling, seen = [], [], 0
        for rows, columns in (GRIDS[kind] for kind in kinds):
            n = 1 + rows * columns // 4
            crops.append(torch.randn(n, SIDE**2, 3 * PATCH**2, generator=rng))
            numbers = torch.arange(n).view(-1, 1, 1) * SIDE**2 + JOINED + seen
            high, wide = rows // 2, columns // 2
            large = numbers[1:].view(high, wide, 2, 2, 4).transpose(1, 2).reshape(-1, 4)
            pooling += [numbers[0], large]
            seen += n * SIDE**2
        joined = torch.cat(pooling)
        joined[-1, -1] = -1  # an edge, where fewer patches join
        grids = torch.tensor([[2, 2, *GRIDS[kind]] for kind in kinds])
        return {"pixel_values": torch.cat(crops), "image_token_pooling": joined, "image_grids": grids}
