"""Synthetic inputs of `generate()` for the model of a configuration: noise for pictures and clips, random words.

How many tokens a picture has, and which ids mark it, is asked of its family; only the shapes of pixels are said here,
once for all families of a kind.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from foveate.asking.mistake import Mistake
from foveate.families import get_family, unknown_family
from foveate.families.base import Family
from foveate.families.gemma4 import Gemma4
from foveate.families.grid import Glm4v, Grid, KimiK25, Qwen3VL, Qwen35, Qwen35Moe
from foveate.families.lfm2_vl import Lfm2VL
from foveate.families.llava import Llava
from foveate.families.llava_next import LlavaNext, LlavaNextVideo
from foveate.families.minicpmv4_6 import MiniCPMV46
from foveate.families.mllama import Mllama
from foveate.families.molmo2 import Molmo2
from foveate.families.paligemma import PaliGemma
from foveate.families.pixtral import Pixtral
from foveate.families.queries import Idefics2, Queries
from foveate.families.squares import FastVlm, Idefics3, Squares, Tiles

BEFORE, AFTER = 32, 32  # text tokens in front of the image and behind it
SHORTER = 16  # how much shorter every second sample of a padded batch is
USUAL = 1296  # tokens of a picture that may have any number: 36 x 36
WORD, WHOLE = 3, 4  # ids of text that stand behind a frame or in front of a tile, and in front of a whole picture
STAMPED = (Qwen3VL, Qwen35, Qwen35Moe, Glm4v, KimiK25)  # each frame of a clip stands by itself, beside its time
EDGES = (("vision_start", "vision_end"), ("image_start", "image_end"), ("boi", "eoi"))
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
    family = get_family(config)
    if family is None:
        raise Mistake(unknown_family(config.model_type))
    rng = torch.Generator().manual_seed(seed)
    if frames is None:
        wanted = Wanted(config, batch, 1, tokens, rng)
        pixels = pictures(family, wanted)
        shown = written(family, wanted, pixels)
    else:
        pixels, shown = clips(family, Wanted(config, batch, frames, tokens, rng))
    special = torch.tensor([value for name, value in _ids(config).items() if value > WHOLE])
    words = torch.arange(WORD, config.get_text_config().vocab_size)
    words = words[~torch.isin(words, special)]
    rows = []
    for row in range(batch):
        after = AFTER - SHORTER * (padded and row % 2 == 1)
        text = words[torch.randint(len(words), (BEFORE + after,), generator=rng)]
        rows.append(torch.cat([text[:BEFORE], torch.tensor(shown), text[BEFORE:]]))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return {"input_ids": ids, "attention_mask": mask, **pixels, **_beside(family, config, ids, pixels)}


def _ids(config: Config) -> dict[str, int]:
    """What the configuration says of tokens that are no words."""
    said = config.to_dict().items()
    return {name: value for name, value in said if name.endswith(("_id", "_index")) and isinstance(value, int)}


def _beside(family: Family, config: Config, ids: Tensor, pixels: Inputs) -> Inputs:
    """What the model's own signature asks for beside ids and pixels: the kinds of tokens, and who sees the image."""
    if "cross" in family.places:
        seen = (ids == family.image_token_id(config)).cumsum(1) > 0  # the words after the image look at it
        tiles = config.vision_config.max_num_tiles
        return {"cross_attention_mask": seen[:, :, None, None].expand(-1, -1, 1, tiles).long()}
    video = "pixel_values_videos" in pixels
    placeholder = family.video_token_id(config) if video else family.image_token_id(config)
    # To Molmo 2 frames are images.
    kinds = ids.eq(torch.tensor(placeholder)).int() * (2 if video and not isinstance(family, Molmo2) else 1)
    if isinstance(family, PaliGemma):  # all of it is a prompt, which sees itself both ways
        kinds = torch.zeros_like(kinds)
    model: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    takes = () if model is None else inspect.signature(model.forward).parameters
    return {name: kinds for name in takes if name.endswith("token_type_ids")}


@dataclass(frozen=True)
class Wanted:
    """What is asked for. frames: pictures of each sample. tokens: of each picture, None for the model's usual number.

    rng: makes the noise.
    """

    config: Config
    batch: int
    frames: int
    tokens: int | None
    rng: torch.Generator

    @property
    def pictures(self) -> int:
        """Of all samples."""
        return self.batch * self.frames

    def noise(self, *shape: int) -> Tensor:
        """Normal noise."""
        return torch.randn(shape, generator=self.rng)

    def squares(self, *shape: int) -> Tensor:
        """Pictures of the size that the encoder sees."""
        size = getattr(self.config.vision_config, "image_size", None)
        if size is None:
            raise _unknown(self.config)
        edge = size if isinstance(size, int) else size[0]
        return self.noise(*shape, 3, edge, edge)

    def grid(self, usual: int) -> tuple[int, int]:
        """Rows and columns of a picture with so many tokens, as square as it can be."""
        tokens = self.tokens or usual
        rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
        if tokens > 4 * rows * rows:
            square = math.isqrt(tokens) ** 2
            raise Mistake(f"--image-tokens {tokens} makes no picture of a usual shape: use {square} or {square + 4}")
        return rows, tokens // rows


def _unknown(config: Config) -> Mistake:
    return Mistake(f"no synthetic inputs for {config.model_type} models: measure a model of another family")


def _edges(config: Config, *names: tuple[str, str]) -> tuple[list[int], list[int]]:
    """The ids in front of an image and behind it, where the configuration has some of these names."""
    for pair in names:
        ids: list[Any] = [getattr(config, f"{name}_token_id", None) for name in pair]
        if None not in ids:
            return [ids[0]], [ids[1]]
    return [], []


def written(family: Family, wanted: Wanted, pixels: Inputs) -> list[int]:
    """The ids of one picture in the prompt."""
    config, placeholder = wanted.config, family.image_token_id(wanted.config)
    if "encoder" not in family.places:
        return [placeholder]
    start, end = _edges(config, *EDGES)
    if isinstance(family, Tiles):
        each = _each(family, config)
        tiles, run = _tiles(family, wanted), [placeholder] * each
        marked = [id for tile in range(tiles) for id in (WHOLE if tile == tiles - 1 else WORD, *run)]
        spellings = ([*start, *marked, *end], [*start, *run * tiles, *end])
        # The one that the family reads as one image.
        return next(ids for ids in spellings if len(family.layouts(config, {"input_ids": torch.tensor([ids])})) == 1)
    count = family.layouts(config, pixels)[0].tokens
    _check(wanted, count)
    return [*start, *[placeholder] * count, *end]


def _check(wanted: Wanted, count: int) -> None:
    if wanted.tokens not in (None, count):
        raise Mistake(f"--image-tokens {wanted.tokens}: this model gives every picture {count} tokens")


@singledispatch
def pictures(family: Family, wanted: Wanted) -> Inputs:
    """The pixels of every sample's pictures, and what else the encoder is told of them."""
    raise _unknown(wanted.config)


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
    return {"pixel_values": wanted.squares(wanted.pictures * _tiles(family, wanted))}


@pictures.register
def _tiled_by_sample(family: Idefics3, wanted: Wanted) -> Inputs:
    return {"pixel_values": wanted.squares(wanted.batch, wanted.frames * _tiles(family, wanted))}


def _each(family: Tiles, config: Config) -> int:
    """Tokens of a tile."""
    return (family.side(config) // family.factor(config)) ** 2


def _tiles(family: Tiles, wanted: Wanted) -> int:
    """Tiles of a picture, the whole one among them; if nobody says, of a square close to the usual number of tokens."""
    each = _each(family, wanted.config)
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
    pixels, height, width = _patches(family, wanted)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]] * wanted.pictures)}


def _patches(family: Grid, wanted: Wanted) -> tuple[Tensor, int, int]:
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
    joined = _pooled(wanted.config, 2)
    side = math.isqrt(len(joined))
    tokens = (1 + round(math.sqrt(max(USUAL / len(joined) - 1, 1))) ** 2) * len(joined)
    tokens = wanted.tokens or tokens
    crops = tokens // len(joined) - 1
    if tokens % len(joined) or crops < 1:
        raise Mistake(f"--image-tokens {tokens}: crops give multiples of {len(joined)}, from {2 * len(joined)} on")
    high, wide = replace(wanted, tokens=crops).grid(crops)
    numbers = _counted(joined, 1 + crops, wanted.config)
    large = numbers[1:].view(high, wide, side, side, -1).transpose(1, 2).reshape(-1, joined.shape[1])
    one = torch.cat([numbers[0], large])
    patches = (1 + crops) * _patches_each(wanted.config)
    pooling = torch.cat([torch.where(one < 0, one, one + patches * number) for number in range(wanted.pictures)])
    return {
        "pixel_values": _in_patches(wanted, (1 + crops) * wanted.pictures),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[side, side, high * side, wide * side]] * wanted.pictures),
    }


def _pooled(config: Config, factor: int) -> Tensor:
    """(n, factor ** 2) the patches of one of the encoder's pictures that join into each token, -1 beyond its edge."""
    size = config.vision_config.image_size[0] // config.vision_config.patch_size
    tokens = -(-size // factor)
    at = torch.full((tokens * factor, tokens * factor), -1)
    at[:size, :size] = torch.arange(size * size).view(size, size)
    return at.view(tokens, factor, tokens, factor).transpose(1, 2).reshape(-1, factor * factor)


def _patches_each(config: Config) -> int:
    """Patches of one of the encoder's pictures."""
    return int((config.vision_config.image_size[0] // config.vision_config.patch_size) ** 2)


def _counted(joined: Tensor, pictures: int, config: Config) -> Tensor:
    """(pictures, n, k) of `_pooled` for so many pictures, patches counted over all of them."""
    first = torch.arange(pictures).view(-1, 1, 1) * _patches_each(config)
    return torch.where(joined < 0, joined, joined + first)


def _in_patches(wanted: Wanted, pictures: int) -> Tensor:
    return wanted.noise(pictures, _patches_each(wanted.config), 3 * wanted.config.vision_config.patch_size**2)


@pictures.register
def _crossed(family: Mllama, wanted: Wanted) -> Inputs:
    vision, features = wanted.config.vision_config, family.features_per_image(wanted.config)
    _check(wanted, features)
    tiles = vision.max_num_tiles
    ratio = 1 + next(i for i, (x, y) in enumerate(vision.supported_aspect_ratios) if x * y == tiles and x > 1 < y)
    return {
        "pixel_values": wanted.squares(wanted.batch, 1, tiles),
        "aspect_ratio_ids": torch.full((wanted.batch, 1), ratio),
        "aspect_ratio_mask": torch.ones(wanted.batch, 1, tiles, dtype=torch.long),
    }


@singledispatch
def clips(family: Family, wanted: Wanted) -> tuple[Inputs, list[int]]:
    """The inputs that bring one clip a sample, and its ids. Unless a family knows more, frames are images."""
    if "encoder" not in family.places:
        raise Mistake(f"--frames: no synthetic clips for {wanted.config.model_type} models")
    if isinstance(family, Tiles) and wanted.tokens is None:
        wanted = replace(wanted, tokens=_each(family, wanted.config))
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
    pixels, height, width = _patches(family, replace(wanted, frames=wanted.frames * join))
    films = [[1, height, width]] * wanted.pictures if apart else [[wanted.frames * join, height, width]] * wanted.batch
    inputs = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor(films)}
    start, end = _edges(config, *EDGES)
    frame = [placeholder] * (family.video_layouts(config, inputs)[0].tokens // (1 if apart else wanted.frames))
    if not isinstance(family, STAMPED):
        return inputs, [*start, *frame * wanted.frames, *end]
    first, last = _edges(config, ("video_start", "video_end"))
    return inputs, [*first, *[*start, *frame, *end, WORD] * wanted.frames, *last]


@clips.register
def _molmo_clips(family: Molmo2, wanted: Wanted) -> tuple[Inputs, list[int]]:
    joined = _pooled(wanted.config, 3)
    side = math.isqrt(len(joined))
    _check(wanted, len(joined))
    inputs = {
        "pixel_values_videos": _in_patches(wanted, wanted.pictures),
        "video_token_pooling": _counted(joined, wanted.pictures, wanted.config).flatten(0, 1),
        "video_grids": torch.tensor([[wanted.frames, side, side]] * wanted.batch),
    }
    return inputs, [*[family.video_token_id(wanted.config)] * len(joined), WORD] * wanted.frames


@clips.register
def _pooled_clips(family: LlavaNextVideo, wanted: Wanted) -> tuple[Inputs, list[int]]:
    inputs = {"pixel_values_videos": wanted.squares(wanted.batch, wanted.frames)}
    count = family.video_layouts(wanted.config, inputs)[0].tokens
    _check(wanted, (count - family.ends) // wanted.frames)
    return inputs, [family.video_token_id(wanted.config)] * count
