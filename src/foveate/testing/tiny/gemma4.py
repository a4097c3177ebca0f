"""Gemma 4: images of any size, 3 x 3 patches a token; and an E model, whose last layers share keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from .base import IMAGE, LLM, MARK, PATCH, VIDEO, VISION_END, VISION_START, VOCAB, Tiny, moving

GRIDS = [(6, 9), (9, 6), (6, 6), (3, 6)]  # (rows, columns) of patches
FRAMES = [3, 5, 2, 4]
MOST = 90  # patches that a picture is padded to


def padded(pictures: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Pictures of patches and their places, (column, row), all of one length."""
    pixels = torch.zeros(len(pictures), MOST, 3 * PATCH**2)
    places = torch.full((len(pictures), MOST, 2), -1)
    for i, (picture, (rows, columns)) in enumerate(zip(pictures, grids, strict=True)):
        pixels[i, : rows * columns] = picture
        places[i, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
    return pixels, places


class Gemma4(Tiny):
    name, before, after, types = "gemma4", (VISION_START,), (VISION_END,), ("mm_token_type_ids",)
    window, both_ways = 12, True

    def decoding(self) -> dict[str, Any]:
        return dict(use_bidirectional_attention="vision", num_kv_shared_layers=0)

    def options(self) -> dict[str, Any]:
        vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, head_dim=16)
        text = CONFIG_MAPPING["gemma4_text"](
            **LLM | {"num_hidden_layers": 6},
            **self.decoding(),
            head_dim=16,
            global_head_dim=16,
            sliding_window=self.window,
            layer_types=["sliding_attention", "full_attention"] * 3,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8,
        )
        marks = dict(boi_token_id=VISION_START, eoi_token_id=VISION_END, audio_token_id=MARK, boa_token_id=MARK)
        return dict(
            vision_config=vision | dict(num_key_value_heads=2, patch_size=PATCH, position_embedding_size=64),
            text_config=text,
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **marks,
        )

    def tokens(self, kind: int) -> int:
        rows, columns = GRIDS[kind]
        return rows * columns // 9

    def pixels(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        grids = [GRIDS[kind] for kind in kinds]
        pixels, places = padded([torch.rand(h * w, 3 * PATCH**2, generator=rng) for h, w in grids], grids)
        return {"pixel_values": pixels, "image_position_ids": places}

    def clip(self, kind: int) -> list[int]:
        return [self.tokens(kind)] * FRAMES[kind]

    def film(self, kind: int) -> list[int]:
        """A frame at a time, each behind when it is shown."""
        frames = [[3 + i, *self.before, *[VIDEO] * n, *self.after] for i, n in enumerate(self.clip(kind))]
        return [token for frame in frames for token in frame]

    def films(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        frames, grids = [], []
        for rows, columns, n in ((*GRIDS[kind], FRAMES[kind]) for kind in kinds):
            film = moving(n, rows * columns, 3 * PATCH**2, rng).sigmoid()
            frames += film.unflatten(0, (n, -1))
            grids += [(rows, columns)] * n
        pixels, places = padded(frames, grids)
        counts = torch.tensor([FRAMES[kind] for kind in kinds])
        return {"pixel_values_videos": pixels, "video_position_ids": places, "num_frames_per_video": counts}


class Gemma4E(Gemma4):
    name, variant, both_ways = "gemma4_e", True, False

    def decoding(self) -> dict[str, Any]:
        return dict(num_kv_shared_layers=2)
