"""Opens pictures of any kind safely, and draws which of their tokens a method kept."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps, UnidentifiedImageError

from foveate.asking.mistake import Mistake

if TYPE_CHECKING:
    from torch import Tensor

HEIGHT = 448  # pixels of a drawn picture
FRAME = 150  # of a frame of a clip
ACROSS = 8  # frames side by side
MARGIN = 14
TEXT = 17
DIM = 0.28  # brightness of a token that nobody keeps
OUTLINE = (255, 176, 0)  # of what stays: amber, which colour-blind readers see on any picture


def open_picture(path: str | Path) -> Image.Image:
    """Open any picture that Pillow reads as upright 8-bit RGB: the first frame, transparency on white.

    Raises:
        Mistake: for a missing, broken, truncated or oversized file, or one that is no picture.
    """
    name = str(path)
    if len(name) > 300:  # perhaps a picture itself, as base64
        name = f"{name[:60]}..."
    if name.startswith(("http://", "https://")):
        raise Mistake(f"{name} is a web address: download the picture and give the file")
    try:
        if Path(path).is_dir():
            raise Mistake(f"{name} is a folder: give the picture files in it, e.g. {name}/*.jpg")
        if Path(path).stat().st_size == 0:
            raise Mistake(f"{name} is empty: give a file with a picture in it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _as_rgb(ImageOps.exif_transpose(image))
    except Mistake:
        raise
    except FileNotFoundError:
        raise Mistake(f"no such picture: {name} (check the name and the folder)") from None
    except PermissionError:
        raise Mistake(f"no permission to read {name}") from None
    except UnidentifiedImageError:
        raise Mistake(f"{name} holds no picture that Pillow can read: convert it to PNG or JPEG") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise Mistake(f"{name} has more than {limit} million pixels: make it smaller first") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            raise Mistake(f"{name} is too long for the name of a file: save the picture and give its file") from None
        cause = " ".join(str(error).split()) or type(error).__name__
        raise Mistake(f"{name} is broken or truncated ({cause}): save it anew") from None


def _as_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB; Pillow alone would clip 16-bit greys to white and paint transparency black."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
        # What white is, is not in the file: 1 in float pictures, 65535 in 16-bit ones.
        white = next((top for top in (1.0, 255.0, 65535.0) if grey.max() <= top), grey.max())
        white = 65535.0 if image.mode.startswith("I;16") else white
        return Image.fromarray((grey.clip(0) * (255 / white)).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def crop_as_seen(picture: Image.Image, image_processor: Any) -> Image.Image:
    """Cut away what the processor's centre crop hides from the model; tiling processors crop nothing."""
    crop = getattr(image_processor, "crop_size", None)
    tiled = getattr(image_processor, "image_grid_pinpoints", None)
    if not getattr(image_processor, "do_center_crop", False) or not crop or tiled:
        return picture
    size = image_processor.size
    if short := size.get("shortest_edge"):
        resized = [side * short / min(picture.size) for side in picture.size]
    else:
        resized = [size["width"], size["height"]]
    box = [0.0, 0.0, *map(float, picture.size)]
    for i, name in enumerate(("width", "height")):
        hidden = max(0.0, 1 - crop[name] / resized[i]) * picture.size[i]
        box[i], box[i + 2] = hidden / 2, picture.size[i] - hidden / 2
    return picture.crop((round(box[0]), round(box[1]), round(box[2]), round(box[3])))


def kept_shares(report: Any, sample: int = 0) -> tuple[list[Tensor], int, int]:
    """How large a share of all layers and heads keeps each image token.

    report: of a run with `record=True`. Returns per image a tensor (n,) in [0, 1], the number of layers that
    read the image, and the number of heads that choose for themselves (1: the heads agree).
    """
    cross = [layer for layer in report.layers if layer.kind == "cross"]
    kept = [layer.kept[sample].float() for layer in cross or report.layers]
    heads = max(k.shape[0] for k in kept)
    images = report.image_tokens[sample]
    shares = [sum(k[:, image.positions.to(k.device)].mean(0) for k in kept) / len(kept) for image in images]
    return [share.cpu() for share in shares], len(kept), heads


def by_frame(frames: Sequence[Image.Image], tiles: Sequence[Any]) -> list[tuple[Image.Image, list[Any]]]:
    """Each frame that has tokens of its own, and its tiles; of several pictures that a model joins into one the first.

    frames: of a clip, or the one picture. tiles: of its layout.
    """
    count = 1 + max((tile.frame for tile in tiles), default=0)
    return [
        (frames[number * len(frames) // count], [tile for tile in tiles if tile.frame == number])
        for number in range(count)
    ]


def draw_kept(
    picture: Image.Image, tiles: Sequence[Any] = (), share: Tensor | None = None, *, height: int = HEIGHT
) -> Image.Image:
    """Dim and grey each cell of the picture by how few keep its token, and outline those that most keep.

    tiles: `.index` (which of the image's tokens), `.grid` (rows, columns), `.box` (fractions of the picture).
    Where tiles overlap, as the overview and the crops of tiled models do, the finer one is drawn; one that nobody
    knows the place of (no box) is not.
    share: (n,) in [0, 1]. Without tiles the picture stays as it is.
    """
    picture = scaled(picture, height)
    light = paint_cells(picture.size, tiles, share, empty=255)
    return outlined(Image.composite(picture, dimmed(picture), light), light)


def scaled(picture: Image.Image, height: int) -> Image.Image:
    """The picture at this height, or at three times this width where it is wider."""
    scale = min(height / picture.height, 3 * height / picture.width)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def dimmed(picture: Image.Image) -> Image.Image:
    """What a token looks like that nobody keeps."""
    return ImageEnhance.Brightness(ImageOps.grayscale(picture).convert("RGB")).enhance(DIM)


def outlined(picture: Image.Image, light: Image.Image) -> Image.Image:
    """Draw a line round what most keep, which tells it apart in dark pictures, too: bright within, black outside.

    light: as `paint_cells` paints shares.
    """
    stays = np.asarray(light) > 127
    canvas = np.array(picture)
    within = _border(stays, max(1, picture.height // 200))
    canvas[_border(~stays, 1)] = 0
    canvas[within] = OUTLINE
    return Image.fromarray(canvas)


def _border(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask that lie so close to one that is not of it; what lies beyond the picture is."""
    inner = mask
    for _ in range(width):
        padded = np.pad(inner, 1, constant_values=True)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def paint_cells(size: tuple[int, int], tiles: Sequence[Any], values: Tensor | None, *, empty: int) -> Image.Image:
    """A grey picture of one value a token: (n,) in [0, 1]. empty: the grey outside all tiles."""
    canvas = Image.new("L", size, empty)
    for tile in sorted((tile for tile in tiles if tile.box is not None), key=_cell_area, reverse=True):
        assert values is not None
        rows, columns = tile.grid
        cells = (values[tile.index].view(rows, columns) * 255).round().byte().numpy()
        x0, y0, x1, y1 = (round(side * size[i % 2]) for i, side in enumerate(tile.box))
        if x1 > x0 and y1 > y0:
            canvas.paste(Image.fromarray(cells).resize((x1 - x0, y1 - y0), Image.Resampling.NEAREST), (x0, y0))
    return canvas


def _cell_area(tile: Any) -> float:
    x0, y0, x1, y1 = tile.box
    return (x1 - x0) * (y1 - y0) / (tile.grid[0] * tile.grid[1])


def strip(pictures: Sequence[Image.Image], legend: str) -> Image.Image:
    """Put drawn pictures side by side, many in several rows, over one line of text (more where it is too long)."""
    font = ImageFont.load_default(TEXT)
    rows = [pictures[start : start + ACROSS] for start in range(0, len(pictures), ACROSS)]
    width = max(sum(p.width for p in row) + MARGIN * (len(row) - 1) for row in rows)
    heights = [max(p.height for p in row) + MARGIN for row in rows]
    lines = wrap(legend, font, width)
    canvas = Image.new("RGB", (width, sum(heights) - MARGIN + (TEXT + 6) * len(lines) + 8), "white")
    for number, row in enumerate(rows):
        left = 0
        for picture in row:
            canvas.paste(picture, (left, sum(heights[:number])))
            left += picture.width + MARGIN
    top = canvas.height - (TEXT + 6) * len(lines)
    ImageDraw.Draw(canvas).multiline_text((0, top), "\n".join(lines), "#333333", font, spacing=5)
    return canvas


def wrap(text: str, font: Any, width: int) -> list[str]:
    """The lines of a text that is at most so many pixels wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def arrange(strips: Sequence[Image.Image], *, across: bool) -> Image.Image:
    """Arrange strips beside (`across`) or below each other, with a margin around all."""
    along = 0 if across else 1
    size = [max(s.size[i] for s in strips) + 2 * MARGIN for i in (0, 1)]
    size[along] = sum(s.size[along] for s in strips) + MARGIN * (len(strips) + 1)
    canvas = Image.new("RGB", (size[0], size[1]), "white")
    corner = [MARGIN, MARGIN]
    for part in strips:
        canvas.paste(part, (corner[0], corner[1]))
        corner[along] += part.size[along] + MARGIN
    return canvas
