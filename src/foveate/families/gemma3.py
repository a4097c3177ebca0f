"""Gemma 3: images that see themselves both ways, average pooling, and windows in most layers of the decoder."""

from __future__ import annotations

from typing import Any

from . import register
from .squares import Squares


@register
class Gemma3(Squares):
    """Every picture (or crop, with pan and scan) is an image of its own."""

    model_type = "gemma3"
    summary = "Gemma 3 (images seen both ways, sliding windows)"
    examples = ("google/gemma-3-4b-it", "google/gemma-3-12b-it", "google/medgemma-4b-it")

    def factor(self, config: Any) -> int:
        return self.side(config) // int(config.mm_tokens_per_image**0.5)
