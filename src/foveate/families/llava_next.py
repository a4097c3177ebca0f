"""LLaVA-NeXT (1.6): a base tile and crops at higher resolution, unpadded, with newline tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from ..layout import ImageLayout, Tile, joined
from . import register
from .llava import Llava


@register
class LlavaNext(Llava):
    """Base tile first, then the crops merged in whole-image raster order, one newline token after each row.

    Unpadding removes whole rows or columns, so what is left of every crop is a rectangle again. The
    newline tokens belong to no tile: they are structure and always stay.
    """

    model_type = "llava_next"
    summary = "LLaVA-NeXT / 1.6 (tiles of any resolution, newline tokens)"
    examples = ("llava-hf/llava-v1.6-mistral-7b-hf", "llava-hf/llava-v1.6-vicuna-7b-hf")

    def check(self, base: Any) -> str | None:
        if base.config.vision_feature_select_strategy == "full" and self.prefix_tokens(base.config):
            return 'vision_feature_select_strategy "full" puts a [CLS] token into every tile; set it to "default"'
        return super().check(base)

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        strategy = inputs.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
        if (strategy == "default") != bool(self.prefix_tokens(config)):
            raise ValueError(f"vision_feature_select_strategy {strategy!r} does not fit the vision encoder")
        layouts, patches = [], 0
        for number, size in enumerate(inputs["image_sizes"]):
            layout, used = self.layout(config, inputs, number, size, patches)
            layouts.append(layout)
            patches += used
        return layouts

    def parts(self, config: Any, inputs: dict[str, Any], kept: Tensor) -> Tensor:
        """(height, width, k) the patches of the merged crops that each token is made of, the one in its middle first.

        kept: (rows, columns) the numbers of those that unpadding leaves.
        """
        return kept.unsqueeze(-1)

    def layout(
        self, config: Any, inputs: dict[str, Any], number: int, size: Tensor, first: int
    ) -> tuple[ImageLayout, int]:
        """The layout of an image of `size` (height, width), whose patches count from `first`; and how many it has."""
        side = self.side(config)
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        whole = torch.arange(side * side)
        # The model itself says which positions survive: its own unpadding, run on their numbers.
        numbers = torch.arange(rows * side * columns * side).view(1, rows * side, columns * side)
        parts = self.parts(config, inputs, unpad_image(numbers, size)[0])
        height, width = parts.shape[:2]
        row_of, column_of = parts // (columns * side), parts % (columns * side)
        crop_of = row_of // side * columns + column_of // side
        patches = (1 + crop_of) * side * side + row_of % side * side + column_of % side
        patches = patches.squeeze(-1) if patches.shape[-1] == 1 else patches
        token = side * side + torch.arange(height)[:, None] * (width + 1) + torch.arange(width)
        tiles = [Tile(whole, (side, side), first + whole)]
        for row in range(rows):
            for column in range(columns):
                inside = crop_of[..., 0] == row * columns + column
                if not inside.any():
                    continue
                spot = inside.nonzero()
                (top, left), (bottom, right) = spot[0].tolist(), (spot[-1] + 1).tolist()
                tiles.append(
                    Tile(
                        token[inside],
                        (bottom - top, right - left),
                        first + patches[inside],
                        (left / width, top / height, right / width, bottom / height),
                    )
                )
        return ImageLayout(side * side + height * (width + 1), tuple(tiles)), (1 + rows * columns) * side * side


@register
class LlavaNextVideo(LlavaNext):
    """The patches of a video's frame are pooled, stride x stride of them to a token, in front of the projector.

    ends: newline tokens behind a video.
    """

    ends: ClassVar[int] = 0

    model_type = "llava_next_video"
    summary = "LLaVA-NeXT-Video"
    examples = ("llava-hf/LLaVA-NeXT-Video-7B-hf", "llava-hf/LLaVA-NeXT-Video-34B-hf")

    def video_token_id(self, config: Any) -> int:
        return config.video_token_id

    def video_layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        side, (rows, patches) = self.side(config), self.pooled(config)
        index, layouts = torch.arange(rows * rows), []
        for video in range(videos):
            starts = [(frame, (video * frames + frame) * side**2) for frame in range(frames)]
            tiles = (Tile(f * len(index) + index, (rows, rows), first + patches, frame=f) for f, first in starts)
            layouts.append(ImageLayout(frames * len(index) + self.ends, tuple(tiles)))
        return layouts

    def pooled(self, config: Any) -> tuple[int, Tensor]:
        """Of a video's frame: tokens along one side, and (n, k) the patches that each is made of."""
        stride = config.spatial_pool_stride
        return self.side(config) // stride, joined(self.side(config), self.side(config), stride)
