"""Pixels of synthetic pictures, and their ids in a prompt, once for all families of a kind."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import singledispatch

import torch
from torch import Tensor

from foveate.asking.mistake import Mistake
from foveate.families.base import Family
from foveate.families.gemma4 import Gemma4
from foveate.families.grid import Grid
from foveate.families.lfm2_vl import Lfm2VL
from foveate.families.llava import Llava
from foveate.families.llava_next import LlavaNext
from foveate.families.minicpmv4_6 import MiniCPMV46
from foveate.families.mllama import Mllama
from foveate.families.molmo2 import Molmo2
from foveate.families.pixtral import Pixtral
from foveate.families.queries import Idefics2, Queries
from foveate.families.squares import FastVlm, Idefics3, Squares, Tiles

from .wanted import EDGES, WHOLE, WORD, Config, Inputs, Wanted, check_tokens, edges, unknown_inputs

USUAL = 1296  # tokens of a picture that may have any number: 36 x 36


def written(family: Family, wanted: Wanted, pixels: Inputs) -> list[int]:
    """The ids of one picture in the prompt."""
    config, placeholder = wanted.config, family.image_token_id(wanted.config)
    if "encoder" not in family.places:
        return [placeholder]
    start, end = edges(config, *EDGES)
    if isinstance(family, Tiles):
        each = tile_tokens(family, config)
        tiles, run = tile_count(family, wanted), [placeholder] * each
        marked = [id for tile in range(tiles) for id in (WHOLE if tile == tiles - 1 else WORD, *run)]
        spellings = ([*start, *marked, *end], [*start, *run * tiles, *end])
        # The one that the family reads as one image.
        return next(ids for ids in spellings if len(family.layouts(config, {"input_ids": torch.tensor([ids])})) == 1)
    count = family.layouts(config, pixels)[0].tokens
    check_tokens(wanted, count)
    return [*start, *[placeholder] * count, *end]


@singledispatch
def pictures(family: Family, wanted: Wanted) -> Inputs:
    """The pixels of every sample's pictures, and what else the encoder is told of them."""
    raise unknown_inputs(wanted.config)


@pictures.register(Squares)
@pictures.register(Llava)
@pictures.register(Queries)
def _square(family: Family, wanted: Wanted) -> Inputs:
    return {"pixel_values": wanted.squares(wanted.pictures)}


@pictures.register
def _convolved(family: FastVlm, wanted: Wanted) -> Inputs:
    # The stages of its encoder halve a picture six times.
    edge = 64 * family.side(wanted.config)
    return {"pixel_values": wanted.noise(wanted.pictures, 3, edge, edge)}


@pictures.register
def _perceived(family: Idefics2, wanted: Wanted) -> Inputs:
    return {"pixel_values": wanted.squares(wanted.batch, wanted.frames)}


@pictures.register
def _tiled(family: Tiles, wanted: Wanted) -> Inputs:
    return {"pixel_values": wanted.squares(wanted.pictures * tile_count(family, wanted))}


@pictures.register
def _tiled_by_sample(family: Idefics3, wanted: Wanted) -> Inputs:
    return {"pixel_values": wanted.squares(wanted.batch, wanted.frames * tile_count(family, wanted))}


def tile_tokens(family: Tiles, config: Config) -> int:
    """Tokens of a tile."""
    return (family.side(config) // family.factor(config)) ** 2


def tile_count(family: Tiles, wanted: Wanted) -> int:
    """Tiles of a picture, the whole one among them; if nobody says, of a square close to the usual number of tokens."""
    each = tile_tokens(family, wanted.config)
    if wanted.tokens is None:
        return 1 + round(math.sqrt(max(USUAL / each - 1, 0))) ** 2 if each < USUAL else 1
    if wanted.tokens % each:
        raise Mistake(f"--image-tokens {wanted.tokens}: tiles give multiples of {each}")
    return wanted.tokens // each


@pictures.register
def _unpadded(family: LlavaNext, wanted: Wanted) -> Inputs:
    config = wanted.config
    sizes: dict[int, tuple[int, int]] = {}
    edge = config.vision_config.image_size
    for size in sorted(config.image_grid_pinpoints, key=math.prod):
        (layout,) = family.layouts(config, {"image_sizes": torch.tensor([size])})
        sizes.setdefault(layout.tokens, (size[0], size[1]))
    # A photograph is 2 x 2 tiles.
    usual = next((tokens for tokens, size in sizes.items() if size == (2 * edge, 2 * edge)), max(sizes))
    tokens = usual if wanted.tokens is None else wanted.tokens
    if tokens not in sizes:
        known = ", ".join(map(str, sorted(sizes)))
        raise Mistake(f"--image-tokens {tokens}: tiles give {known} (newlines included)")
    height, width = sizes[tokens]
    tiles = 1 + (height // edge) * (width // edge)
    sizes_of_all = torch.tensor([[height, width]] * wanted.pictures)
    return {"pixel_values": wanted.squares(wanted.pictures, tiles), "image_sizes": sizes_of_all}


@pictures.register
def _grids(family: Grid, wanted: Wanted) -> Inputs:
    pixels, height, width = patches_of(family, wanted)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]] * wanted.pictures)}


def patches_of(family: Grid, wanted: Wanted) -> tuple[Tensor, int, int]:
    """The patches of all pictures or frames, and how many of them are above and beside each other in one."""
    vision, merge = wanted.config.vision_config, family.merge(wanted.config)
    height, width = (merge * n for n in wanted.grid(USUAL))
    patches, size = wanted.pictures * height * width, vision.patch_size
    if family.raster:
        return wanted.noise(patches, 3, size, size), height, width
    return wanted.noise(patches, 3 * getattr(vision, "temporal_patch_size", 1) * size**2), height, width


@pictures.register
def _packed(family: Pixtral, wanted: Wanted) -> Inputs:
    patch = wanted.config.vision_config.patch_size * family.merge(wanted.config)
    height, width = (patch * n for n in wanted.grid(USUAL))
    sizes = torch.tensor([[height, width]] * wanted.pictures)
    return {"pixel_values": wanted.noise(wanted.pictures, 3, height, width), "image_sizes": sizes}


@pictures.register
def _gemma4(family: Gemma4, wanted: Wanted) -> Inputs:
    vision = wanted.config.vision_config
    rows, columns = (vision.pooling_kernel_size * n for n in wanted.grid(256))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
    pixels = wanted.noise(wanted.pictures, rows * columns, 3 * vision.patch_size**2)
    return {"pixel_values": pixels, "image_position_ids": places.expand(wanted.pictures, -1, -1)}


@pictures.register
def _lfm2(family: Lfm2VL, wanted: Wanted) -> Inputs:
    config = wanted.config
    height, width = (config.downsample_factor * n for n in wanted.grid(256))
    pixels = wanted.noise(wanted.pictures, height * width, 3 * config.vision_config.patch_size**2)
    mask = torch.ones(pixels.shape[:2], dtype=torch.long)
    sizes = torch.tensor([[height, width]] * wanted.pictures)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": sizes}


@pictures.register
def _minicpm(family: MiniCPMV46, wanted: Wanted) -> Inputs:
    patch, merged = wanted.config.vision_config.patch_size, 1 if wanted.config.downsample_mode == "4x" else 2
    height, width = (merged * wanted.config.merge_kernel_size[0] * n for n in wanted.grid(64))
    pixels = wanted.noise(1, 3, patch, patch * height * width * wanted.pictures)
    return {"pixel_values": pixels, "target_sizes": torch.tensor([[height, width]] * wanted.pictures).int()}


@pictures.register
def _cropped(family: Molmo2, wanted: Wanted) -> Inputs:
    """A small whole picture, and crops at full size, which stand side by side here and overlap in a real picture."""
    joined = pooled(wanted.config, 2)
    side = math.isqrt(len(joined))
    tokens = (1 + round(math.sqrt(max(USUAL / len(joined) - 1, 1))) ** 2) * len(joined)
    tokens = wanted.tokens or tokens
    crops = tokens // len(joined) - 1
    if tokens % len(joined) or crops < 1:
        raise Mistake(f"--image-tokens {tokens}: crops give multiples of {len(joined)}, from {2 * len(joined)} on")
    high, wide = replace(wanted, tokens=crops).grid(crops)
    numbers = counted(joined, 1 + crops, wanted.config)
    large = numbers[1:].view(high, wide, side, side, -1).transpose(1, 2).reshape(-1, joined.shape[1])
    one = torch.cat([numbers[0], large])
    patches = (1 + crops) * picture_patches(wanted.config)
    pooling = torch.cat([torch.where(one < 0, one, one + patches * number) for number in range(wanted.pictures)])
    return {
        "pixel_values": in_patches(wanted, (1 + crops) * wanted.pictures),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[side, side, high * side, wide * side]] * wanted.pictures),
    }


def pooled(config: Config, factor: int) -> Tensor:
    """(n, factor ** 2) the patches of one of the encoder's pictures that join into each token, -1 beyond its edge."""
    size = config.vision_config.image_size[0] // config.vision_config.patch_size
    tokens = -(-size // factor)
    at = torch.full((tokens * factor, tokens * factor), -1)
    at[:size, :size] = torch.arange(size * size).view(size, size)
    return at.view(tokens, factor, tokens, factor).transpose(1, 2).reshape(-1, factor * factor)


def picture_patches(config: Config) -> int:
    """Patches of one of the encoder's pictures."""
    return int((config.vision_config.image_size[0] // config.vision_config.patch_size) ** 2)


def counted(joined: Tensor, pictures: int, config: Config) -> Tensor:
    """(pictures, n, k) of `pooled` for so many pictures, patches counted over all of them."""
    first = torch.arange(pictures).view(-1, 1, 1) * picture_patches(config)
    return torch.where(joined < 0, joined, joined + first)


def in_patches(wanted: Wanted, pictures: int) -> Tensor:
    """Noise in so many of the encoder's pictures, (pictures, patches, numbers of a patch)."""
    return wanted.noise(pictures, picture_patches(wanted.config), 3 * wanted.config.vision_config.patch_size**2)


@pictures.register
def _crossed(family: Mllama, wanted: Wanted) -> Inputs:
    vision, features = wanted.config.vision_config, family.features_per_image(wanted.config)
    check_tokens(wanted, features)
    tiles = vision.max_num_tiles
    ratio = 1 + next(i for i, (x, y) in enumerate(vision.supported_aspect_ratios) if x * y == tiles and x > 1 < y)
    return {
        "pixel_values": wanted.squares(wanted.batch, 1, tiles),
        "aspect_ratio_ids": torch.full((wanted.batch, 1), ratio),
        "aspect_ratio_mask": torch.ones(wanted.batch, 1, tiles, dtype=torch.long),
    }
