"""Synthetic inputs of `generate()` for the model of a configuration: noise for pictures and clips, random words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.asking.mistake import Mistake

BEFORE, AFTER = 32, 32  # text tokens in front of the image and behind it
SHORTER = 16  # how much shorter every second sample of a padded batch is
Config = Any
Inputs = dict[str, Tensor]


def synthetic(
    config: Config,
    batch: int,
    *,
    tokens: int | None = None,
    frames: int | None = None,
    padded: bool = False,
    seed: int = 0,
) -> Inputs:
    """Inputs of `generate()` on the CPU: noise for one picture or clip a sample, random words around it.

    tokens: image tokens of each picture or frame, where the architecture takes pictures of any size. frames: of a clip,
    None for a picture. padded: make every second sample shorter, and pad it on the left.

    Raises:
        Mistake: for an architecture without synthetic inputs, or a number of tokens that it cannot give.
    """
    if config.model_type not in _PICTURES:
        raise Mistake(f"no synthetic inputs for {config.model_type} models: bench takes {', '.join(_PICTURES)}")
    if frames is not None and config.model_type not in _CLIPS:
        raise Mistake(f"--frames: no synthetic clips for {config.model_type} models: use one of {', '.join(_CLIPS)}")
    rng = torch.Generator().manual_seed(seed)
    pictures = batch * (frames or 1)
    pixels, count, around = _PICTURES[config.model_type](config, pictures, tokens, rng)
    placeholder = config.image_token_id
    if frames is not None:
        pixels, placeholder = _CLIPS[config.model_type](config, pixels, frames)
        count *= frames
    words = min(config.get_text_config().vocab_size, config.image_token_id, *around)  # no special tokens
    lengths = [AFTER - SHORTER * (padded and row % 2 == 1) for row in range(batch)]
    rows = []
    for after in lengths:
        text = torch.randint(3, words, (BEFORE + after,), generator=rng)
        picture = torch.full((count,), placeholder)
        edges = [torch.tensor([edge]) for edge in around] or [torch.tensor([], dtype=torch.long)] * 2
        rows.append(torch.cat([text[:BEFORE], edges[0], picture, edges[1], text[BEFORE:]]))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    inputs = {"input_ids": ids, "attention_mask": mask, **pixels}
    if config.model_type == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == placeholder).int() * (1 if frames is None else 2)
    if config.model_type == "mllama":
        seen = (ids == config.image_token_id).cumsum(1) > 0  # the words after the image look at it
        inputs["cross_attention_mask"] = seen[:, :, None, None].expand(-1, -1, 1, config.vision_config.max_num_tiles)
        inputs["cross_attention_mask"] = inputs["cross_attention_mask"].long()
    return inputs


Pictures = tuple[Inputs, int, tuple[int, ...]]


def _llava_pixels(config: Config, batch: int, tokens: int | None, rng: torch.Generator) -> Pictures:
    vision = config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2
    if config.vision_feature_select_strategy == "full" and vision.model_type == "clip_vision_model":
        count += 1
    if tokens not in (None, count):
        raise Mistake(f"--image-tokens {tokens}: this model gives every picture {count} tokens")
    return {"pixel_values": torch.randn(batch, 3, vision.image_size, vision.image_size, generator=rng)}, count, ()


def _picture(config: Config, tokens: int | None) -> tuple[int, int, int]:
    """Height, width and tokens of a LLaVA-NeXT picture that fills its tiles; None asks for the most tokens."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    counts = {}
    for height, width in config.image_grid_pinpoints:
        rows, columns = (edge // config.vision_config.image_size * side for edge in (height, width))
        counts[side * side + rows * (columns + 1)] = (height, width)
    count = max(counts) if tokens is None else tokens
    if count not in counts:
        raise Mistake(f"--image-tokens {tokens}: tiles give {', '.join(map(str, sorted(counts)))} (newlines included)")
    return *counts[count], count


def _llava_next_pixels(config: Config, batch: int, tokens: int | None, rng: torch.Generator) -> Pictures:
    height, width, count = _picture(config, tokens)
    edge = config.vision_config.image_size
    tiles = 1 + (height // edge) * (width // edge)
    pixels = torch.randn(batch, tiles, 3, edge, edge, generator=rng)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]] * batch)}, count, ()


def _grid(tokens: int | None) -> tuple[int, int]:
    """Rows and columns of a picture with so many tokens, as square as it can be."""
    tokens = tokens or 1296
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    if tokens > 4 * rows * rows:
        square = math.isqrt(tokens) ** 2
        raise Mistake(f"--image-tokens {tokens} makes no picture of a usual shape: use {square} or {square + 4}")
    return rows, tokens // rows


def _qwen_pixels(config: Config, batch: int, tokens: int | None, rng: torch.Generator) -> Pictures:
    vision, (rows, columns) = config.vision_config, _grid(tokens)
    merge = vision.spatial_merge_size
    patches = batch * rows * columns * merge * merge
    pixels = torch.randn(patches, 3 * vision.temporal_patch_size * vision.patch_size**2, generator=rng)
    grid = torch.tensor([[1, rows * merge, columns * merge]] * batch)
    around = (config.vision_start_token_id, config.vision_end_token_id)
    return {"pixel_values": pixels, "image_grid_thw": grid}, rows * columns, around


def _mllama_pixels(config: Config, batch: int, tokens: int | None, rng: torch.Generator) -> Pictures:
    vision = config.vision_config
    if tokens not in (None, 6404):
        raise Mistake(f"--image-tokens {tokens}: Llama-3.2-Vision always reads 6404 features, 4 tiles of 1601")
    tiles, edge = vision.max_num_tiles, vision.image_size
    ratio = 1 + next(i for i, (x, y) in enumerate(vision.supported_aspect_ratios) if x * y == tiles and x > 1 < y)
    pixels = {
        "pixel_values": torch.randn(batch, 1, tiles, 3, edge, edge, generator=rng),
        "aspect_ratio_ids": torch.full((batch, 1), ratio),
        "aspect_ratio_mask": torch.ones(batch, 1, tiles, dtype=torch.long),
    }
    return pixels, 1, ()


_PICTURES: dict[str, Callable[[Config, int, int | None, torch.Generator], Pictures]] = {
    "llava": _llava_pixels,
    "llava_next": _llava_next_pixels,
    "qwen2_5_vl": _qwen_pixels,
    "mllama": _mllama_pixels,
}


def _qwen_clip(config: Config, pixels: Inputs, frames: int) -> tuple[Inputs, int]:
    grids = pixels["image_grid_thw"][::frames].clone()
    grids[:, 0] = frames
    return {"pixel_values_videos": pixels["pixel_values"], "video_grid_thw": grids}, config.video_token_id


# What the pixels of frames become as clips, and the placeholder; where frames are pictures they stay what they are.
_CLIPS: dict[str, Callable[[Config, Inputs, int], tuple[Inputs, int]]] = {
    "llava": lambda config, pixels, frames: (pixels, config.image_token_id),
    "qwen2_5_vl": _qwen_clip,
}
