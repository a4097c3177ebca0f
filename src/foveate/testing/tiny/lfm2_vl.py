"""LFM2-VL: pictures as rows of patches, padded, and convolutions in every other decoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Lfm2Config

from .base import IMAGE, LLM, PATCH, VISION, Tiny
from .qwen2_5_vl import GRIDS


class Lfm2VL(Tiny):
    name = "lfm2_vl"

    def options(self) -> dict[str, Any]:
        types = ["conv", "full_attention"] * 3
        text = Lfm2Config(**LLM | dict(num_hidden_layers=6, layer_types=types, block_ff_dim=96))
        vision = dict(model_type="siglip2_vision_model", patch_size=PATCH, num_patches=144, vision_use_head=False)
        return dict(vision_config=VISION | vision, text_config=text, image_token_id=IMAGE, downsample_factor=2)

    def tokens(self, kind: int) -> int:
        _, height, width = GRIDS[kind]
        return height * width // 4

    def pixels(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        sizes = [GRIDS[kind][1:] for kind in kinds]
        room = max(height * width for height, width in sizes)
        pixels, mask = torch.zeros(len(sizes), room, 3 * PATCH**2), torch.zeros(len(sizes), room, dtype=torch.long)
        for row, (height, width) in enumerate(sizes):
            pixels[row, : height * width] = torch.randn(height * width, 3 * PATCH**2, generator=rng)
            mask[row, : height * width] = 1
        return {"pixel_values": pixels, "spatial_shapes": torch.tensor(sizes), "pixel_attention_mask": mask}
