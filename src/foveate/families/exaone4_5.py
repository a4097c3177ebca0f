"""EXAONE 4.5: the vision encoder of Qwen2.5-VL, and a decoder with windows in most layers."""

from __future__ import annotations

from . import register
from .qwen2_5_vl import Qwen2_5_VL


@register
class Exaone4_5(Qwen2_5_VL):
    """Images come as those of Qwen2.5-VL."""

    model_type = "exaone4_5"
    summary = "EXAONE 4.5 (any resolution, sliding windows)"
    examples = ("LGAI-EXAONE/EXAONE-4.5-33B",)
