"""Qwen2.5-VL: any resolution, window attention without a [CLS] token, M-RoPE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import ImageLayout, Tile
from . import register
from .base import Family


@register
class Qwen2_5_VL(Family):
    """An image, and each frame of a video, is a grid of merged (usually 2 x 2) patches, encoded in windows."""

    model_type = "qwen2_5_vl"
    summary = "Qwen2.5-VL (any resolution, M-RoPE)"
    examples = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")

    def check(self, base: Any) -> str | None:
        if self._full_blocks(base):
            return None
        return "its vision encoder has no full-attention block"

    def _full_blocks(self, base: Any) -> list[int]:
        return sorted(i for i in base.visual.fullatt_block_indexes if i < len(base.visual.blocks))

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        full = self._full_blocks(base)
        # Full-attention blocks up to the penultimate: windows see too little to rank.
        inner = [i for i in full if i <= len(base.visual.blocks) - 2]
        return [base.visual.blocks[i].attn for i in inner or full]

    def encoder_layers(self, base: Any) -> list[nn.Module]:
        return list(base.visual.blocks)

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        return self._layouts(config, inputs["image_grid_thw"])

    def video_token_id(self, config: Any) -> int:
        return config.video_token_id

    def video_layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        return self._layouts(config, inputs["video_grid_thw"])

    def _layouts(self, config: Any, grids: Tensor) -> list[ImageLayout]:
        merge, layouts, first = config.vision_config.spatial_merge_size, [], 0
        for frames, height, width in grids.tolist():
            grid = (height // merge, width // merge)
            index = torch.arange(grid[0] * grid[1])
            starts = [frame * len(index) for frame in range(frames)]
            tiles = (Tile(at + index, grid, first + at + index, frame=frame) for frame, at in enumerate(starts))
            layouts.append(ImageLayout(frames * len(index), tuple(tiles)))
            first += frames * len(index)
        return layouts

    def patch_values(self, base: Any, parts: Sequence[Tensor], layouts: Sequence[ImageLayout]) -> Tensor:
        visual = base.visual
        merged = super().patch_values(base, parts, layouts).unflatten(0, (-1, visual.spatial_merge_unit)).mean(1)
        side = visual.window_size // visual.spatial_merge_size // visual.patch_size
        order, first = [], 0
        for tile in (tile for layout in layouts for tile in layout.tiles):
            (rows, columns) = tile.grid
            index = torch.arange(rows * columns)
            row, column = index // columns, index % columns
            window = row // side * (columns // side + 1) + column // side
            order.append(first + window.argsort(stable=True))
            first += len(index)
        # merged[i] belongs to token order[i]: the inverse of the window order.
        return merged[torch.cat(order).argsort().to(merged.device)]
