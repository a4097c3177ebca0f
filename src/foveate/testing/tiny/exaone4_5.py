"""EXAONE 4.5: images of any size, windows in half of the layers."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

from .base import IMAGE, LLM, VIDEO
from .qwen2_5_vl import Qwen2_5_VL


class Exaone4_5(Qwen2_5_VL):
    name, whole, window, types = "exaone4_5", False, 8, ()

    def options(self) -> dict[str, Any]:
        kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
        text = CONFIG_MAPPING["exaone4"](**LLM, sliding_window=self.window, layer_types=kinds)
        vision = super().options()["vision_config"] | {"num_key_value_heads": 2}
        return dict(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO)
