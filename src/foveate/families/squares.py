"""What the families share whose encoder sees one square at a time, a whole picture or a tile of one; most of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layout import WHOLE, Box, ImageLayout, Tile, as_clip, grid_boxes, joined
from . import register
from .base import Family


class Squares(Family):
    """Every picture of the encoder is one square of patches, factor x factor of which join into a token.

    tower: name of the vision encoder.
    """

    tower: ClassVar[str] = "vision_tower"

    def factor(self, config: Any) -> int:
        """Patches along one side of a token."""
        return 1

    def leading(self, config: Any, inputs: dict[str, Any]) -> int:
        """Tokens in front of the patches that the LLM gets, too ([CLS])."""
        return 0

    def side(self, config: Any) -> int:
        vision = config.vision_config
        size, patch = (n if isinstance(n, int) else n[0] for n in (vision.image_size, vision.patch_size))
        return size // patch

    def prefix_tokens(self, config: Any) -> int:
        # CLIP and its kin have a [CLS] token, SigLIP has none.
        return int("clip" in config.vision_config.model_type)

    def encoder_layers(self, base: Any) -> list[Any]:
        return deepest(getattr(base, self.tower).encoder.layers, base.config)

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in getattr(base, self.tower).encoder.layers[:-1]]

    def square(self, config: Any, number: int, first: int, box: Box | None = WHOLE) -> Tile:
        """The encoder's picture of this number as a tile, whose tokens begin at `first`."""
        side, factor = self.side(config), self.factor(config)
        patches = joined(side, side, factor) if factor > 1 else torch.arange(side * side)
        index = first + torch.arange(len(patches))
        return Tile(index, (side // factor, side // factor), number * side * side + patches, box)

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        cls = self.leading(config, inputs)
        squares = [self.square(config, number, cls) for number in range(len(inputs["pixel_values"]))]
        return [ImageLayout(cls + len(square.index), (square,)) for square in squares]


def deepest(layers: Sequence[Any], config: Any) -> list[Any]:
    """The layers up to the one whose output the features are made of; of several, the deepest."""
    feature = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", -1))
    features = [feature] if isinstance(feature, int) else feature
    return list(layers[: max(at % (len(layers) + 1) for at in features)])


class Tiles(Squares):
    """An image is several pictures of the encoder, and only the prompt says how many."""

    needs_prompt = True

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        tokens, sizes = (self.side(config) // self.factor(config)) ** 2, inputs.get("image_sizes")
        images = []
        for row in inputs["input_ids"].cpu():
            starts = row.eq(self.image_token_id(config)).nonzero()[::tokens, 0]
            images += [(row, part) for part in self.images(row, starts, tokens)] if len(starts) else []
        if sizes is not None and len(sizes) != len(images):
            raise ValueError(f"image_sizes are of {len(sizes)} pictures, and the prompt has {len(images)}")
        layouts, number = [], 0
        for i, (row, starts) in enumerate(images):
            boxes = self.boxes(row, starts, tokens, None if sizes is None else sizes[i])
            squares = [self.square(config, number + at, at * tokens, box) for at, box in enumerate(boxes)]
            layouts.append(ImageLayout(len(squares) * tokens, tuple(squares)))
            number += len(squares)
        return layouts

    def images(self, row: Tensor, starts: Tensor, tokens: int) -> list[Tensor]:
        """The tiles of each image. row: (q,) a prompt. starts: (tiles,) where each tile's `tokens` begin in it."""
        # One run of placeholders an image.
        return split_behind(starts, starts.diff() != tokens)

    def boxes(self, row: Tensor, starts: Tensor, tokens: int, size: tuple[int, int] | None) -> list[Box | None]:
        """Where each tile of an image lies. size: (height, width) of the picture, None where nobody says."""
        # The whole picture comes last; where it is one tile, it comes alone.
        tiles = len(starts) - 1
        if not tiles:
            return [WHOLE]
        return [*([None] * tiles if size is None else grid_boxes(*closest_grid(tiles, size))), WHOLE]


def split_behind(values: Tensor, ends: Tensor) -> list[Tensor]:
    """Parts of `values` (n,), which end where `ends`, bool (n - 1,), is True."""
    return list(values.tensor_split((ends.nonzero()[:, 0] + 1).tolist()))


def closest_grid(tiles: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of so many tiles, whose shape is closest to a picture's. size: (height, width)."""
    grids = [(tiles // columns, columns) for columns in range(1, tiles + 1) if tiles % columns == 0]
    return min(grids, key=lambda grid: abs(size[1] / size[0] - grid[1] / grid[0]))


class MarkedTiles(Tiles):
    """A token in front of each tile names its place; that of the whole picture, which comes last, has one name."""

    def images(self, row: Tensor, starts: Tensor, tokens: int) -> list[Tensor]:
        marks = row[(starts - 1).clamp(min=0)]
        return split_behind(starts, (marks == marks[-1])[:-1])


@register
class InternVL(Tiles):
    """Tiles of one size, and the whole picture behind them."""

    model_type = "internvl"
    summary = "InternVL 2.5, 3 and 3.5 (tiles)"
    examples = ("OpenGVLab/InternVL3_5-8B-HF", "OpenGVLab/InternVL3-2B-hf")

    def factor(self, config: Any) -> int:
        return round(1 / config.downsample_ratio)

    def prefix_tokens(self, config: Any) -> int:
        return 1

    def encoder_layers(self, base: Any) -> list[Any]:
        return deepest(base.vision_tower.encoder.layer, base.config)

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        return [layer.attention for layer in base.vision_tower.encoder.layer[:-1]]


@register
class Idefics3(MarkedTiles):
    """Tokens in front of every tile name its row and column, which are text, as the newlines behind rows are."""

    model_type = "idefics3"
    summary = "Idefics3 (tiles between tokens that name them)"
    examples = ("HuggingFaceM4/Idefics3-8B-Llama3",)
    tower = "vision_model"

    def decoder(self, base: Any) -> Any:
        return base.text_model

    def factor(self, config: Any) -> int:
        return config.scale_factor

    def boxes(self, row: Tensor, starts: Tensor, tokens: int, size: tuple[int, int] | None) -> list[Box | None]:
        tiles = starts[:-1]
        if not len(tiles):
            return [WHOLE]
        # Two tokens stand between the tiles of a row, and behind each row a newline, too.
        rows = split_behind(tiles, tiles.diff() > tokens + 2)
        even = {len(row) for row in rows} == {len(rows[0])}
        return [*(grid_boxes(len(rows), len(rows[0])) if even else [None] * len(tiles)), WHOLE]


@register
class SmolVLM(Idefics3):
    """As Idefics3, in small."""

    model_type = "smolvlm"
    summary = "SmolVLM and SmolVLM2"
    examples = ("HuggingFaceTB/SmolVLM2-2.2B-Instruct",)


@register
class VipLlava(Squares):
    """Patches as several encoder layers leave them, joined; [CLS] goes."""

    model_type = "vipllava"
    summary = "ViP-LLaVA"
    examples = ("llava-hf/vip-llava-7b-hf",)


@register
class DeepseekVL(Squares):
    """A SigLIP."""

    model_type = "deepseek_vl"
    summary = "DeepSeek-VL"
    examples = ("deepseek-community/deepseek-vl-7b-chat",)
    tower = "vision_model"


@register
class Janus(DeepseekVL):
    """Pictures that are looked at; those that it draws are no prompt."""

    model_type = "janus"
    summary = "Janus (understanding pictures)"
    examples = ("deepseek-community/Janus-Pro-7B",)


@register
class Ovis2(Squares):
    """Tiles stand apart, between indicator tokens: each is an image of its own."""

    model_type = "ovis2"
    summary = "Ovis2 (every tile is an image)"
    examples = ("thisisiron/Ovis2-8B-hf",)

    def factor(self, config: Any) -> int:
        return config.vision_config.hidden_stride

    def encoder_layers(self, base: Any) -> list[Any]:
        return list(base.vision_tower.transformer.encoder.layers)

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        return [layer.attention for layer in self.encoder_layers(base)[:-1]]


@register
class VideoLlava(Squares):
    """With the "full" strategy [CLS] comes along; with the frames of videos always."""

    model_type = "video_llava"
    summary = "Video-LLaVA (an encoder for images, one for videos)"
    examples = ("LanguageBind/Video-LLaVA-7B-hf",)
    tower = "image_tower"

    def leading(self, config: Any, inputs: dict[str, Any]) -> int:
        return int((inputs.get("vision_feature_select_strategy") or config.vision_feature_select_strategy) == "full")

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        pixels = inputs.get("pixel_values")
        pixels = inputs["pixel_values_images"] if pixels is None else pixels
        return super().layouts(config, {**inputs, "pixel_values": pixels})

    def seeing(self, medium: str) -> Family:
        return _OF_VIDEOS if medium == "video" else self

    def video_token_id(self, config: Any) -> int:
        return config.video_token_id

    def video_layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        squares = [self.square(config, number, 1) for number in range(videos * frames)]
        pictures = [ImageLayout(1 + len(square.index), (square,)) for square in squares]
        return [as_clip(pictures[video * frames : (video + 1) * frames]) for video in range(videos)]


class _OfVideos(VideoLlava):
    """Its second encoder."""

    tower = "video_tower"


_OF_VIDEOS = _OfVideos()


@register
class GotOcr2(Squares):
    """A SAM encoder, whose attention adds relative positions outside of any interface; two convolutions behind it."""

    model_type = "got_ocr2"
    summary = "GOT-OCR 2 (an encoder without attention to read)"
    examples = ("stepfun-ai/GOT-OCR-2.0-hf",)
    shows_attention = False

    def factor(self, config: Any) -> int:
        return 4


@register
class FastVlm(Squares):
    """An encoder of convolutions."""

    model_type = "fast_vlm"
    summary = "FastVLM (an encoder without attention to read)"
    examples = ("KamilaMila/FastVLM-7B",)
    shows_attention = False

    def side(self, config: Any) -> int:
        return int(config.image_seq_length**0.5)
