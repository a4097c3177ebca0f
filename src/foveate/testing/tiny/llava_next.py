"""LLaVA-NeXT: 4 x 4 tokens a tile; images differ in tiling and in unpadding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlavaNextVideoForConditionalGeneration, PreTrainedConfig, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from .base import IMAGE, LLM, PATCH, VIDEO, Tiny, clip, noise

PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
SIDE = 16
SIZES = [(30, 20), (12, 44), (31, 31), (40, 14)]  # (height, width)


def tiles(kind: int) -> int:
    """Tiles of an image of this kind, the base tile among them."""
    return image_size_to_num_patches(SIZES[kind], PINPOINTS, SIDE)


def tiled_pixels(kinds: Sequence[int], rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Tiles of each image, padded to the image with most, and the sizes of the images."""
    counts = [tiles(kind) for kind in kinds]
    pixels = torch.zeros(len(kinds), max(counts), 3, SIDE, SIDE)
    for i, n in enumerate(counts):
        pixels[i, :n] = noise(rng, n, 3, SIDE, SIDE)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([SIZES[kind] for kind in kinds])}


def film(rng: torch.Generator, frames: int, side: int) -> torch.Tensor:
    """Square pictures of which half of the patches change from one to the next."""
    moves = torch.rand(frames, 1, side // PATCH, side // PATCH, generator=rng) < 0.5
    moves = moves.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    return torch.where(moves, noise(rng, frames, 3, side, side), noise(rng, 1, 3, side, side))


class LlavaNext(Tiny):
    name, whole = "llava_next", True

    def options(self) -> dict[str, Any]:
        return dict(
            vision_config=clip(SIDE),
            text_config=LlamaConfig(**LLM),
            image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS,
        )

    def tokens(self, kind: int) -> int:
        this = SimpleNamespace(
            image_processor=SimpleNamespace(image_grid_pinpoints=PINPOINTS),
            patch_size=PATCH,
            num_additional_image_tokens=1,
            _get_unpadded_features=partial(LlavaNextProcessor._get_unpadded_features, None),
        )
        return LlavaNextProcessor._get_number_of_features(this, *SIZES[kind], SIDE, SIDE) - 1  # without the CLS

    def pixels(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        return tiled_pixels(kinds, rng)


class LlavaNextVideo(LlavaNext):
    name = "llava_next_video"

    def options(self) -> dict[str, Any]:
        return super().options() | dict(video_token_index=VIDEO)

    def make(self, config: PreTrainedConfig) -> PreTrainedModel:
        return LlavaNextVideoForConditionalGeneration(config)

    def clip(self, kind: int) -> list[int]:
        return [4] * 3  # all films of a batch have as many frames

    def film(self, kind: int) -> list[int]:
        return [VIDEO] * sum(self.clip(kind))

    def films(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values_videos": torch.stack([film(rng, 3, SIDE) for _ in kinds])}
