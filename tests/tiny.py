"""The tiny models of `foveate.testing`, and which of them the tests take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from foveate.testing.tiny import built_in
from foveate.testing.tiny.base import (
    CACHE,
    IMAGE,
    LLM,
    PAD,
    PATCH,
    TEXT,
    VIDEO,
    VISION,
    VISION_END,
    VISION_START,
    VOCAB,
    Tiny,
)
from foveate.testing.tiny.building import (
    BATCHES,
    build,
    config,
    image_counts,
    inputs,
    next_turn,
    of,
    video_counts,
    videos,
)

__all__ = [
    "BATCHES", "CACHE", "CORE", "CORE_DECODERS", "DECODER_FAMILIES", "FAMILIES", "IMAGE", "LLM", "PAD", "PATCH",
    "TEXT", "VARIANTS", "VIDEO", "VIDEO_FAMILIES", "VISION", "VISION_END", "VISION_START", "VOCAB", "Tiny", "build",
    "config", "image_counts", "inputs", "next_turn", "of", "sampled", "video_counts", "videos",
]  # fmt: skip

found = built_in()
FAMILIES = tuple(name for name, family in found.items() if not family.variant)
# Image tokens sit in the prompt; others are looked at through cross-attention.
DECODER_FAMILIES = tuple(name for name in FAMILIES if found[name].in_prompt)
# All rows of the matrix run for these, and a sample for the others: each of them stands for a kind.
CORE = tuple(name for name in FAMILIES if found[name].whole)
CORE_DECODERS = tuple(name for name in CORE if name in DECODER_FAMILIES)
# Their models take videos.
VIDEO_FAMILIES = tuple(name for name in FAMILIES if found[name].clip(0))
VARIANTS = tuple(name for name, family in found.items() if family.variant)


def sampled(families: Iterable[str]) -> list[Any]:
    """These families as parameters of a test; beyond the core they are slow."""
    return [pytest.param(name, marks=[] if name in CORE else pytest.mark.slow) for name in families]
