"""PaliGemma 1 and 2: one picture, and a prompt that sees itself both ways."""

from __future__ import annotations

from . import register
from .squares import Squares


@register
class PaliGemma(Squares):
    """A token for every patch; PaliGemma 2 has windows in every other layer of its decoder."""

    model_type = "paligemma"
    summary = "PaliGemma 1 and 2 (a prompt that sees itself both ways)"
    examples = ("google/paligemma-3b-mix-448", "google/paligemma2-3b-mix-448")
