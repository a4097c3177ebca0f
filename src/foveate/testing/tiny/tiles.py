"""Tiles that only the prompt counts: InternVL, Idefics3 and SmolVLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config

from .base import BREAK, IMAGE, LLM, MARK, PATCH, VISION, VISION_END, VISION_START, Tiny, noise

SIDE = 24  # 6 x 6 patches, which join into 3 x 3 tokens
GRIDS = [(1, 2), (2, 2), (1, 1), (3, 1)]  # rows and columns of tiles; the whole picture comes behind several


def squares(kind: int) -> int:
    """Pictures that the encoder sees of an image of this kind."""
    tiles = GRIDS[kind][0] * GRIDS[kind][1]
    return tiles + (tiles > 1)


class Tiles(Tiny):
    before, after = (VISION_START,), (VISION_END,)

    def tokens(self, kind: int) -> int:
        return 9 * squares(kind)

    def pixels(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values": noise(rng, sum(map(squares, kinds)), 3, SIDE, SIDE)}


class InternVL(Tiles):
    name = "internvl"

    def options(self) -> dict[str, Any]:
        return dict(
            vision_config=dict(**VISION, image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]),
            text_config=Qwen2Config(**LLM),
            image_token_id=IMAGE,
            image_seq_length=9,
        )


class Idefics3(Tiles):
    """MARK and the ids from 80 on name tiles, VISION_START stands around them, and BREAK is a newline."""

    name, decoder = "idefics3", "text_model"

    def options(self) -> dict[str, Any]:
        vision = dict(**VISION, image_size=SIDE, patch_size=PATCH)
        return dict(vision_config=vision, text_config=LlamaConfig(**LLM), image_token_id=IMAGE, scale_factor=2)

    def image(self, kind: int) -> list[int]:
        rows, columns = GRIDS[kind]
        ids = []
        for row in range(rows if squares(kind) > 1 else 0):
            for column in range(columns):
                ids += [VISION_START, 80 + 3 * row + column, *[IMAGE] * 9]
            ids.append(BREAK)
        return [*ids, *[BREAK] * bool(ids), VISION_START, MARK, *[IMAGE] * 9, VISION_START]

    def images(self, ids: Tensor, kinds: Sequence[Sequence[int]], rng: torch.Generator) -> dict[str, Tensor]:
        counts = [sum(map(squares, row)) for row in kinds]
        pixels = torch.zeros(len(kinds), max(counts), 3, SIDE, SIDE)
        for row, count in enumerate(counts):
            pixels[row, :count] = noise(rng, count, 3, SIDE, SIDE)
        return {"pixel_values": pixels, "pixel_attention_mask": (pixels[:, :, 0] != 0).long()}


class SmolVLM(Idefics3):
    name = "smolvlm"
