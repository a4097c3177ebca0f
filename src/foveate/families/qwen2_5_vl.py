"""Qwen2.5-VL: any resolution, window attention without a [CLS] token, M-RoPE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from . import register
from .grid import Grid


@register
class Qwen2_5_VL(Grid):
    """An image, and each frame of a video, is a grid of merged (usually 2 x 2) patches, encoded in windows."""

    model_type = "qwen2_5_vl"
    summary = "Qwen2.5-VL (any resolution, M-RoPE)"
    examples: ClassVar[tuple[str, ...]] = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")

    def check(self, base: Any) -> str | None:
        if self.readable(base.config, len(base.visual.blocks)):
            return None
        return "its vision encoder has no full-attention block"

    def readable(self, config: Any, depth: int) -> list[int]:
        full = sorted(i for i in config.vision_config.fullatt_block_indexes if i < depth)
        # Full-attention blocks up to the penultimate: windows see too little to rank.
        return [i for i in full if i <= depth - 2] or full

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        blocks = base.visual.blocks
        return [blocks[i].attn for i in self.readable(base.config, len(blocks))]

    def order(self, config: Any, height: int, width: int) -> torch.Tensor:
        vision, merge = config.vision_config, self.merge(config)
        side = vision.window_size // merge // vision.patch_size
        columns = width // merge
        index = torch.arange(height // merge * columns)
        row, column = index // columns, index % columns
        window = row // side * (columns // side + 1) + column // side
        # What stands at each place of the window order, and so where each token stands.
        at = window.argsort(stable=True).argsort()
        return at.unsqueeze(1) * merge**2 + torch.arange(merge**2)
