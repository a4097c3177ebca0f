"""What the families share whose images and frames are grids of merged patches, with sizes in `image_grid_thw`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layout import ImageLayout, Tile, joined
from . import register
from .base import Family


class Grid(Family):
    """Every image, and each frame of a video, is one grid of patches, of any size, and merge x merge of them (usually
    2 x 2) join into a token.

    encoder: name of the vision encoder. raster: whether its patches stand in raster order, and not token by token.
    video: what the configuration calls the placeholder of videos; None where the model takes none.
    """

    encoder: ClassVar[str] = "visual"
    raster: ClassVar[bool] = False
    video: ClassVar[str | None] = "video_token_id"

    def merge(self, config: Any) -> int:
        """Patches along one side of a token."""
        return config.vision_config.spatial_merge_size

    def encoder_layers(self, base: Any) -> list[Any]:
        return list(getattr(base, self.encoder).blocks)

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        return [layer.attn for layer in self.encoder_layers(base)[:-1]]

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        return self._layouts(config, inputs["image_grid_thw"])

    def video_token_id(self, config: Any) -> int | None:
        return None if self.video is None else getattr(config, self.video)

    def video_layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        return self._layouts(config, inputs["video_grid_thw"])

    def together(self, config: Any, frames: int) -> int:
        """How many frames of a video of so many join into one."""
        return 1

    def _layouts(self, config: Any, grids: Tensor) -> list[ImageLayout]:
        merge, layouts, first = self.merge(config), [], 0
        for number, height, width in grids.tolist():
            tiles, join = [], self.together(config, number)
            for frame in range(number // join):
                own = self.order(config, height, width)
                patches = torch.cat([first + at * height * width + own for at in range(join)], -1)
                index = frame * len(patches) + torch.arange(len(patches))
                tiles.append(Tile(index, (height // merge, width // merge), patches, frame=frame))
                first += join * height * width
            layouts.append(ImageLayout(sum(len(tile.index) for tile in tiles), tuple(tiles)))
        return layouts

    def order(self, config: Any, height: int, width: int) -> torch.Tensor:
        """(n, merge ** 2) the encoder's patches of each token of an image or frame. height, width: in patches."""
        merge = self.merge(config)
        return joined(height, width, merge) if self.raster else torch.arange(height * width).view(-1, merge * merge)


@register
class Qwen2VL(Grid):
    """An encoder without windows."""

    model_type = "qwen2_vl"
    summary = "Qwen2-VL (any resolution, M-RoPE)"
    examples = ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct")

    def width(self, config: Any) -> int:
        return config.vision_config.embed_dim


@register
class Glm4v(Grid):
    """GLM-4.1V. Frames of videos are spelled with the placeholder of images."""

    video = "image_token_id"
    model_type = "glm4v"
    summary = "GLM-4.1V"
    examples = ("zai-org/GLM-4.1V-9B-Thinking",)


@register
class Glm4vMoe(Glm4v):
    """GLM-4.5V."""

    model_type = "glm4v_moe"
    summary = "GLM-4.5V (mixture of experts)"
    examples = ("zai-org/GLM-4.5V",)


@register
class Glm46v(Glm4v):
    """GLM-4.6V."""

    model_type = "glm46v"
    summary = "GLM-4.6V"
    examples = ("zai-org/GLM-4.6V-Flash",)


@register
class GlmOcr(Glm4v):
    """GLM-OCR."""

    model_type = "glm_ocr"
    summary = "GLM-OCR"
    examples = ("zai-org/GLM-OCR",)


@register
class PaddleOcrVL(Grid):
    """A SigLIP that packs pictures of any size, patches in raster order."""

    model_type = "paddleocr_vl"
    summary = "PaddleOCR-VL"
    examples = ("PaddlePaddle/PaddleOCR-VL",)
    raster, video = True, None

    def encoder_layers(self, base: Any) -> list[Any]:
        return list(base.visual.vision_model.encoder.layers)

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in self.encoder_layers(base)[:-1]]


@register
class KimiK25(Grid):
    """MoonViT keeps patches in raster order, and joins the pictures of a video, up to four, which come as one; the
    decoder's cache is latent."""

    model_type = "kimi_k25"
    summary = "Kimi K2.5"
    examples = ("moonshotai/Kimi-K2.5",)
    raster = frames_apart = True

    def merge(self, config: Any) -> int:
        return config.vision_config.merge_kernel_size[0]

    def together(self, config: Any, frames: int) -> int:
        return frames

    def encoder_layers(self, base: Any) -> list[Any]:
        return list(base.vision_tower.layers)


@register
class Qwen3VL(Grid):
    """Features of several encoder layers join the first layers of the decoder (DeepStack)."""

    model_type = "qwen3_vl"
    summary = "Qwen3-VL (DeepStack)"
    examples = ("Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3-VL-8B-Instruct")
    deepstack = "_deepstack_process"


@register
class Qwen3VLMoe(Qwen3VL):
    """The same with experts."""

    model_type = "qwen3_vl_moe"
    summary = "Qwen3-VL (DeepStack, mixture of experts)"
    examples = ("Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3-VL-235B-A22B-Instruct")


@register
class Qwen35(Grid):
    """Most decoder layers carry a state, and attend to nothing."""

    model_type = "qwen3_5"
    summary = "Qwen3.5 (linear attention in most layers)"
    examples = ("Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-27B")


@register
class Qwen35Moe(Grid):
    """The same with experts."""

    model_type = "qwen3_5_moe"
    summary = "Qwen3.5 (linear attention in most layers, mixture of experts)"
    examples = ("Qwen/Qwen3.5-35B-A3B", "Qwen/Qwen3.5-397B-A17B")


@register
class Ernie45VLMoe(Grid):
    """Experts of its own for image tokens; which tokens those are comes beside the hidden states. Two pictures of a
    video join into one frame."""

    model_type = "ernie4_5_vl_moe"
    summary = "ERNIE 4.5 VL (mixture of experts)"
    examples = ("baidu/ERNIE-4.5-VL-28B-A3B-PT",)
    encoder = "vision_tower"

    def together(self, config: Any, frames: int) -> int:
        return config.vision_config.temporal_merge_size if frames > 1 else 1
