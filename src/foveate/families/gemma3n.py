"""Gemma 3n: a convolutional encoder, several streams of hidden states, windows, and layers that share entries."""

from __future__ import annotations

from typing import Any

from . import register
from .squares import Squares


@register
class Gemma3n(Squares):
    """A MobileNet makes one grid of tokens of every picture."""

    model_type = "gemma3n"
    summary = "Gemma 3n (an encoder without attention, sliding windows, shared KV layers)"
    examples = ("google/gemma-3n-E2B-it", "google/gemma-3n-E4B-it")
    shows_attention = False

    def side(self, config: Any) -> int:
        return int(config.vision_soft_tokens_per_image**0.5)
