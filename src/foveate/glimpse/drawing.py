"""Paints a scene: its background, and its things upon it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from foveate.glimpse.scene import COLOURS, PATCH, PRINT, PRINTED, SHAPES, SIZE, SPRITES, Scene, Thing

ATLAS = Path(__file__).with_name("sprites.png")
ATLAS_COLUMNS = 10
SPRITE = 112  # pixels a side of one sprite in the atlas


def render(scene: Scene, size: int = SIZE) -> Image.Image:
    """Paint a scene as an RGB picture of `size` x `size` pixels."""
    picture = _background(np.random.default_rng(scene.background), size)
    for thing in _bottom_up(scene):
        stamp = _stamp(thing, size, _is_dark(picture, thing, size))
        picture.paste(stamp, _corner(thing, stamp, size), stamp)
    return picture


def coverage(scene: Scene, size: int = SIZE) -> np.ndarray:
    """Which thing lies on each patch of a picture of `size` x `size` pixels.

    Returns `(size / 14, size / 14)` indices into `scene.things`, -1 where there is none.
    """
    side = size // PATCH
    owner = np.full((side, side), -1, np.int64)
    for thing in _bottom_up(scene):
        stamp = _stamp(thing, size)
        layer = Image.new("L", (size, size))
        layer.paste(stamp.getchannel("A"), _corner(thing, stamp, size))
        share = np.asarray(layer.reduce(PATCH), np.float32) / 255
        owner[share > (0.02 if thing.kind in PRINTED else 0.25)] = scene.things.index(thing)
    return owner


def columns(text: str) -> list[tuple[str, int, int]]:
    """Words of print, each with the first patch column that it fills and the first behind it, from 0 on."""
    font = _font(round(PRINT * SIZE))
    found, begin = [], 0
    for word in text.split():
        end = begin + _patches(word, font, PATCH)
        found.append((word, begin, end))
        begin = end + 1
    return found


def _patches(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, raster: int) -> int:
    """Patches that a word is long. What is left white behind its last letter may reach into the next."""
    return -int(-(font.getlength(word) - raster / 7) // raster)


def _bottom_up(scene: Scene) -> list[Thing]:
    """Things in the order they are painted: print comes last, so that nothing covers it."""
    return sorted(scene.things, key=lambda thing: thing.kind in PRINTED)


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """Two colours blended along a random direction, with soft blotches or stripes and fine noise."""
    first, second = rng.uniform(30, 235, (2, 3)).astype(np.float32)
    if rng.random() < 0.6:
        second = first + rng.uniform(-50, 50, 3).astype(np.float32)
    turn = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    along = axis[None] * np.float32(np.cos(turn)) + axis[:, None] * np.float32(np.sin(turn))
    pixels = first + (along[..., None] + 0.5) * (second - first)
    strength = rng.uniform(0, 18)
    if rng.random() < 0.6:
        coarse = rng.integers(0, 256, (int(rng.integers(3, 14)),) * 2).astype(np.uint8)
        blotches = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        pixels += (np.asarray(blotches, np.float32) / 127.5 - 1)[..., None] * strength
    else:
        pixels += np.sin(along * rng.uniform(20, 90))[..., None] * strength
    grain = rng.integers(-1, 2, (SIZE, SIZE, 1)) * rng.uniform(0, 9)
    repeat = -(-size // SIZE)
    pixels += np.tile(grain, (repeat, repeat, 1))[:size, :size].astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@lru_cache(maxsize=1)
def _sprites() -> dict[str, Image.Image]:
    atlas = Image.open(ATLAS).convert("RGBA")
    corners = [(i % ATLAS_COLUMNS * SPRITE, i // ATLAS_COLUMNS * SPRITE) for i in range(len(SPRITES))]
    return {
        name: atlas.crop((left, top, left + SPRITE, top + SPRITE))
        for name, (left, top) in zip(SPRITES, corners, strict=True)
    }


@lru_cache(maxsize=256)
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(pixels)


def _corner(thing: Thing, stamp: Image.Image, size: int) -> tuple[int, int]:
    """Upper left corner that centres a stamp, pushed inside the picture where it would be cut off.

    Print lies on the raster of the patches, so that a model this small learns to read it in minutes.
    """
    step = size * PATCH // SIZE if thing.kind in PRINTED else 1
    left, top = (
        min(max(round((centre * size - side / 2) / step), 0), (size - side) // step) * step
        for centre, side in ((thing.x, stamp.width), (thing.y, stamp.height))
    )
    return left, top


@lru_cache(maxsize=32)
def _stamp(thing: Thing, size: int, on_dark: bool = False) -> Image.Image:
    """Paint one thing alone on a transparent ground."""
    pixels = max(round(thing.size * size), 8)
    if thing.kind in SPRITES:
        stamp = _sprites()[thing.kind].resize((pixels, pixels), Image.Resampling.BILINEAR)
        bands = stamp.split()
        lit = [band.point([min(255, round(v * thing.brightness)) for v in range(256)]) for band in bands[:3]]
        stamp = Image.merge("RGBA", [*lit, bands[3]])
    elif thing.kind in SHAPES:
        stamp = _shape(thing.kind, thing.detail, round(0.85 * pixels))
    else:
        return _print(thing.detail, pixels, size * PATCH // SIZE, on_dark)
    return stamp.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)


def _shape(kind: str, colour: str, pixels: int) -> Image.Image:
    scale = 3  # drawn large and reduced, for smooth edges
    end = pixels * scale
    stamp = Image.new("RGBA", (end, end), (*COLOURS[colour], 0))
    draw = ImageDraw.Draw(stamp)
    fill, line = (*COLOURS[colour], 255), (70, 70, 70, 255)
    inset = end // 12
    low, high, half = inset, end - inset, end // 2
    if kind == "circle":
        draw.ellipse((low, low, high, high), fill, line, scale)
    elif kind == "square":
        draw.rectangle((low, low, high, high), fill, line, scale)
    elif kind == "triangle":
        draw.polygon([(half, low), (high, high), (low, high)], fill, line, scale)
    else:
        draw.polygon([(half, 0), (end - 1, half), (half, end - 1), (0, half)], fill, line, scale)
    return stamp.reduce(scale)


def _print(text: str, pixels: int, raster: int, on_dark: bool) -> Image.Image:
    """Words side by side, each beginning on the raster of the patches."""
    font = _font(pixels)
    words = text.split()
    widths = [_patches(word, font, raster) for word in words]
    stamp = Image.new("RGBA", ((sum(widths) + len(words) - 1) * raster, 2 * raster))
    ink, halo = ((255, 255, 255), (0, 0, 0)) if on_dark else ((10, 10, 10), (255, 255, 255))
    draw = ImageDraw.Draw(stamp)
    for alpha, colour, width in ((110, halo, 1), (255, ink, 0)):
        left = 0
        for word, patches in zip(words, widths, strict=True):
            fill = (*colour, alpha)
            draw.text((left, raster), word, fill, font, "lm", stroke_width=width, stroke_fill=fill)
            left += (patches + 1) * raster
    return stamp


def _is_dark(picture: Image.Image, thing: Thing, size: int) -> bool:
    if thing.kind not in PRINTED:
        return False  # only print minds
    column, row = int(thing.x * size), int(thing.y * size)
    reach = max(size // 10, 1)
    across = size // 2 if thing.kind == "line" else reach
    around = picture.crop((max(column - across, 0), max(row - reach // 2, 0), column + across, row + reach // 2))
    return float(np.asarray(around.convert("L")).mean()) < 128
