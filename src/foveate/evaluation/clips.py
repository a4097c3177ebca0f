"""Synthetic clips: their pixels, and their ids in a prompt."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import singledispatch

import torch

from foveate.asking.mistake import Mistake
from foveate.families.base import Family
from foveate.families.grid import Glm4v, Grid, KimiK25, Qwen3VL, Qwen35, Qwen35Moe
from foveate.families.llava_next import LlavaNextVideo
from foveate.families.molmo2 import Molmo2
from foveate.families.squares import Tiles

from .pictures import counted, in_patches, patches_of, pictures, pooled, tile_tokens, written
from .wanted import EDGES, WORD, Inputs, Wanted, check_tokens, edges

STAMPED = (Qwen3VL, Qwen35, Qwen35Moe, Glm4v, KimiK25)  # each frame of a clip stands by itself, beside its time


@singledispatch
def clips(family: Family, wanted: Wanted) -> tuple[Inputs, list[int]]:
    """The inputs that bring one clip a sample, and its ids. Unless a family knows more, frames are images."""
    if "encoder" not in family.places:
        raise Mistake(f"--frames: no synthetic clips for {wanted.config.model_type} models")
    if isinstance(family, Tiles) and wanted.tokens is None:
        wanted = replace(wanted, tokens=tile_tokens(family, wanted.config))
    pixels = pictures(family, wanted)
    return pixels, [*written(family, wanted, pixels), WORD] * wanted.frames


@clips.register
def _grid_clips(family: Grid, wanted: Wanted) -> tuple[Inputs, list[int]]:
    config, placeholder = wanted.config, family.video_token_id(wanted.config)
    if placeholder is None:
        return clips.dispatch(Family)(family, wanted)
    apart = family.frames_apart
    # Of how many pictures a frame is made.
    join = 1 if apart else family.together(config, 2)
    pixels, height, width = patches_of(family, replace(wanted, frames=wanted.frames * join))
    films = [[1, height, width]] * wanted.pictures if apart else [[wanted.frames * join, height, width]] * wanted.batch
    inputs = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor(films)}
    start, end = edges(config, *EDGES)
    frame = [placeholder] * (family.video_layouts(config, inputs)[0].tokens // (1 if apart else wanted.frames))
    if not isinstance(family, STAMPED):
        return inputs, [*start, *frame * wanted.frames, *end]
    first, last = edges(config, ("video_start", "video_end"))
    return inputs, [*first, *[*start, *frame, *end, WORD] * wanted.frames, *last]


@clips.register
def _molmo_clips(family: Molmo2, wanted: Wanted) -> tuple[Inputs, list[int]]:
    joined = pooled(wanted.config, 3)
    side = math.isqrt(len(joined))
    check_tokens(wanted, len(joined))
    inputs = {
        "pixel_values_videos": in_patches(wanted, wanted.pictures),
        "video_token_pooling": counted(joined, wanted.pictures, wanted.config).flatten(0, 1),
        "video_grids": torch.tensor([[wanted.frames, side, side]] * wanted.batch),
    }
    return inputs, [*[family.video_token_id(wanted.config)] * len(joined), WORD] * wanted.frames


@clips.register
def _pooled_clips(family: LlavaNextVideo, wanted: Wanted) -> tuple[Inputs, list[int]]:
    inputs = {"pixel_values_videos": wanted.squares(wanted.batch, wanted.frames)}
    count = family.video_layouts(wanted.config, inputs)[0].tokens
    check_tokens(wanted, (count - family.ends) // wanted.frames)
    return inputs, [family.video_token_id(wanted.config)] * count
