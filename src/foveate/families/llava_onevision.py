"""LLaVA-OneVision: as LLaVA-NeXT, with the crops of large pictures shrunk to fewer tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..layout import ImageLayout, Tile
from . import register
from .llava_next import LlavaNextVideo


@register
class LlavaOnevision(LlavaNextVideo):
    """Tokens of shrunk crops, and those of a video's frames, lie between patches, up to four of which they are made of.

    Of several images in a sample each is one tile, and ends with one newline token, as a video does.
    """

    ends = 1

    model_type = "llava_onevision"
    summary = "LLaVA-OneVision (tiles of any resolution, shrunk; newline tokens)"
    examples = ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf")

    def layout(
        self, config: Any, inputs: dict[str, Any], number: int, size: Tensor, first: int
    ) -> tuple[ImageLayout, int]:
        counts = inputs.get("batch_num_images")
        beside = [] if counts is None else [n for n in torch.as_tensor(counts).tolist() for _ in range(n)]
        if counts is None or beside[number] == 1:
            return super().layout(config, inputs, number, size, first)
        side = self.side(config)
        whole = torch.arange(side * side)
        return ImageLayout(side * side + 1, (Tile(whole, (side, side), first + whole),)), side * side

    def parts(self, config: Any, inputs: dict[str, Any], kept: Tensor) -> Tensor:
        most = int((inputs.get("vision_aspect_ratio") or config.vision_aspect_ratio).removeprefix("anyres_max_"))
        ratio = math.sqrt(kept.numel() / (most * self.side(config) ** 2))
        if ratio <= 1.1:
            return super().parts(config, inputs, kept)
        down, across = (between(n, int(n // ratio)) for n in kept.shape)
        return kept[down[:, None, :, None], across[None, :, None, :]].flatten(2)

    def pooled(self, config: Any) -> tuple[int, Tensor]:
        side = self.side(config)
        rows = -(-side // 2)
        beside = between(side, rows)
        patches = side * beside[:, None, :, None] + beside[None, :, None, :]
        return rows, patches.flatten(2).flatten(0, 1)


def between(n: int, m: int) -> Tensor:
    """(m, 2) the two of n points that each of m lies between when n are interpolated to m; the nearer one first."""
    at = ((torch.arange(m, dtype=torch.float64) + 0.5) * n / m - 0.5).clamp(0, n - 1)
    near, far = at.round().long(), torch.where(at > at.round(), at.ceil(), at.floor()).long()
    return torch.stack([near, far], 1)
