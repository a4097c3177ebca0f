"""Small multiples over a picture: what layers and heads keep, by what, and where they look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from foveate.asking.pictures import MARGIN, by_frame, dimmed, outlined, paint_cells, scaled, wrap

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.layout import Tile

TEXT = 14
GAP = 6
WIDTH = 1800  # of a sheet, about
LOWEST, MIDDLE, TALLEST = 64, 280, 448  # heights of a panel; the tallest where there are only one or two
INK = "#333333"
COLOURS = "inferno"

Draw = Callable[[Image.Image, "Sequence[Tile]", "Tensor"], Image.Image]


@dataclass(frozen=True)
class View:
    """A picture, or a frame, under tiles that do not overlap.

    image: which of the question's images and clips. name: "" where it is the only view of it.
    """

    image: int
    picture: Image.Image
    tiles: tuple[Tile, ...]
    name: str = ""


def views(shown: Sequence[Sequence[Image.Image]], tilings: Sequence[Sequence[Tile]]) -> list[View]:
    """Every picture and frame as often as its tiles lie above each other: the overview and the crops of tiled models.

    A tile that nobody knows the place of is not drawn. shown: the frames of each clip, of a picture one. tilings: the
    tiles of each.
    """
    out = []
    for number, (frames, tiles) in enumerate(zip(shown, tilings, strict=True)):
        parts = by_frame(frames, tiles)
        for frame, (picture, own) in enumerate(parts):
            named = f"frame {frame + 1}" if len(parts) > 1 else ""
            levels = _levels([tile for tile in own if tile.box is not None])
            names = ["overview", "tiles", *map(str, range(3, len(levels) + 1))] if len(levels) > 1 else [""]
            pairs = zip(levels, names, strict=False)
            out += [View(number, picture, tuple(level), f"{named} {name}".strip()) for level, name in pairs]
    return out


def _levels(tiles: Sequence[Tile]) -> list[list[Tile]]:
    levels: list[list[Tile]] = []
    for tile in tiles:
        level = next((level for level in levels if not any(_overlap(tile, other) for other in level)), None)
        if level is None:
            levels.append([tile])
        else:
            level.append(tile)
    return levels


def _overlap(one: Tile, other: Tile) -> bool:
    assert one.box is not None and other.box is not None
    return all(max(one.box[i], other.box[i]) < min(one.box[i + 2], other.box[i + 2]) for i in (0, 1))


def draw_share(picture: Image.Image, tiles: Sequence[Tile], values: Tensor) -> Image.Image:
    """Dim each cell by how few keep its token, and outline those that most keep. values: (n,) in [0, 1]."""
    light = paint_cells(picture.size, tiles, values, empty=0)
    return outlined(Image.composite(picture, dimmed(picture), light), light)


def draw_heat(picture: Image.Image, tiles: Sequence[Tile], values: Tensor) -> Image.Image:
    """Lay values over the grey picture as colours. values: (n,) >= 0; the largest is brightest, by square roots."""
    heat = paint_cells(picture.size, tiles, (values / values.max().clamp(min=1e-30)).sqrt(), empty=0)
    heat.putpalette(palette())
    return Image.blend(ImageOps.grayscale(picture).convert("RGB"), heat.convert("RGB"), 0.72)


def draw_rank(picture: Image.Image, tiles: Sequence[Tile], values: Tensor) -> Image.Image:
    """Lay ranks over the grey picture as colours, and let fade what has none. values: (n,) in [0, 1], NaN for none."""
    asked = paint_cells(picture.size, tiles, (~values.isnan()).float(), empty=0)
    ranks = paint_cells(picture.size, tiles, values.nan_to_num(0), empty=0)
    ranks.putpalette(palette())
    grey = ImageOps.grayscale(picture).convert("RGB")
    faded = Image.blend(grey, Image.new("RGB", picture.size, "white"), 0.7)
    return Image.composite(Image.blend(grey, ranks.convert("RGB"), 0.72), faded, asked)


@cache
def palette() -> bytes:
    """256 colours, dark to bright, as RGB bytes."""
    import matplotlib
    import numpy as np

    colours: Any = matplotlib.colormaps[COLOURS](np.arange(256), bytes=True)
    return bytes(colours[:, :3].tobytes())


def panel(shown: Sequence[View], values: Sequence[Tensor], draw: Draw) -> Image.Image:
    """All views side by side. values: for each of the question's images, one a token."""
    parts = []
    for view in shown:
        part = draw(view.picture, view.tiles, values[view.image])
        if len(view.tiles) > 1:
            _outline(part, view.tiles)
        parts.append(part)
    canvas = Image.new("RGB", (sum(p.width + 2 for p in parts) - 2, max(p.height for p in parts)), "white")
    left = 0
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width + 2
    return canvas


def _outline(picture: Image.Image, tiles: Sequence[Tile]) -> None:
    pen = ImageDraw.Draw(picture)
    for tile in tiles:
        assert tile.box is not None
        x0, y0, x1, y1 = (round(side * picture.size[i % 2]) for i, side in enumerate(tile.box))
        pen.rectangle((x0, y0, min(x1, picture.width - 1), min(y1, picture.height - 1)), outline="#9fd0ff")


def fitted(shown: Sequence[View], columns: int) -> list[View]:
    """The views at a size of which this many panels fit side by side."""
    aspect = sum(scaled(view.picture, 100).width / 100 for view in shown)
    height = int(max(LOWEST, min(MIDDLE if columns > 2 else TALLEST, (WIDTH / columns - GAP) / aspect)))
    return [replace(view, picture=scaled(view.picture, height)) for view in shown]


def sheet(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]], *, scale: str = "") -> Image.Image:
    """Panels in rows under a title. rows: each with a name, which stands left of it, and its panels, each with a
    caption, which stands above it; either may be "". scale: what the colours mean."""
    large, small = ImageFont.load_default(TEXT + 3), ImageFont.load_default(TEXT)
    wide, high = rows[0][1][0][1].size
    left = max(int(small.getlength(line)) for name, _ in rows for line in [*name.splitlines(), ""])
    left = MARGIN + (left + MARGIN if left else 0)
    width = max(left + max(len(panels) for _, panels in rows) * (wide + GAP) - GAP + MARGIN, 760)
    lines = _wrapped(title, large, width - 2 * MARGIN)
    tops, bottom = [], MARGIN + len(lines) * (TEXT + 9) + (34 if scale else 6)
    for _, panels in rows:
        tops.append(bottom + (TEXT + 8 if any(caption for caption, _ in panels) else 0))
        bottom = tops[-1] + high + GAP
    canvas = Image.new("RGB", (width, bottom - GAP + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    pen.multiline_text((MARGIN, MARGIN), "\n".join(lines), INK, large, spacing=6)
    if scale:
        _explain(canvas, pen, small, MARGIN + len(lines) * (TEXT + 9) + 4, scale)
    for top, (name, panels) in zip(tops, rows, strict=True):
        pen.multiline_text((MARGIN, top), name, INK, small, spacing=4)
        for number, (caption, part) in enumerate(panels):
            x = left + number * (wide + GAP)
            pen.text((x, top - TEXT - 5), caption, INK, small)
            canvas.paste(part, (x, top))
    return canvas


def _explain(canvas: Image.Image, pen: ImageDraw.ImageDraw, font: Any, top: int, text: str) -> None:
    bar = Image.linear_gradient("L").rotate(90).resize((160, 12))
    bar.putpalette(palette())
    canvas.paste(bar.convert("RGB"), (MARGIN, top + 4))
    pen.text((MARGIN + 170, top), text, INK, font)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    return [line for part in text.splitlines() for line in wrap(part, font, width)]
