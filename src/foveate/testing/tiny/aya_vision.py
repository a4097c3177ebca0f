"""Aya Vision and Command A Vision: tiles of 3 x 3 tokens, windows in every other layer."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from .base import BREAK, IMAGE, LLM, MARK
from .llava import siglip
from .tiles import SIDE, Tiles, squares


def cohere2(window: int) -> PreTrainedConfig:
    """A decoder with windows in every other layer."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return CONFIG_MAPPING["cohere2"](**LLM, sliding_window=window, layer_types=kinds)


class AyaVision(Tiles):
    """MARK names the whole picture, the ids from 80 on name tiles."""

    name, window = "aya_vision", 8

    def options(self) -> dict[str, Any]:
        return dict(vision_config=siglip(SIDE), text_config=cohere2(self.window), image_token_index=IMAGE)

    def image(self, kind: int) -> list[int]:
        tiles = [token for tile in range(squares(kind) - 1) for token in (80 + tile, *[IMAGE] * 9)]
        return [*self.before, *tiles, MARK, *[IMAGE] * 9, *self.after]


class Cohere2Vision(Tiles):
    name, window = "cohere2_vision", 8

    def options(self) -> dict[str, Any]:
        sizes = dict(image_token_id=IMAGE, alignment_intermediate_size=64)
        return dict(vision_config=siglip(SIDE), text_config=cohere2(self.window), **sizes)

    def image(self, kind: int) -> list[int]:
        return [*self.before, *[*[IMAGE] * 9, BREAK] * squares(kind), *self.after]
