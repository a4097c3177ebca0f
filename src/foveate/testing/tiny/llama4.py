"""Llama 4: tiles of 3 x 3 tokens, and layers that see chunks of 16 tokens."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .base import BREAK, IMAGE, LLM, MARK, PATCH, VISION, VISION_END, VISION_START
from .tiles import GRIDS, SIDE, Tiles

SEPARATOR = 80  # between the tiles of a row; MARK stands in front of the whole picture, BREAK behind rows


class Llama4(Tiles):
    name, window = "llama4", 16

    def options(self) -> dict[str, Any]:
        sizes = dict(image_size=SIDE, patch_size=PATCH, pixel_shuffle_ratio=0.5, intermediate_size=128)
        widths = dict(vision_output_dim=48, projector_input_dim=48, projector_output_dim=48)
        text = CONFIG_MAPPING["llama4_text"](
            **LLM,
            head_dim=16,
            intermediate_size_mlp=96,
            num_local_experts=2,
            attention_chunk_size=self.window,
            interleave_moe_layer_step=2,
            no_rope_layer_interval=2,
        )
        return dict(
            vision_config=VISION | sizes | widths,
            text_config=text,
            image_token_index=IMAGE,
            boi_token_index=VISION_START,
            eoi_token_index=VISION_END,
        )

    def make(self, config: PreTrainedConfig) -> PreTrainedModel:
        if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
            # transformers 5.24 asks the decoder's output for a field that it does not have, and fails.
            MoeCausalLMOutputWithPast.image_outputs = None
        return super().make(config)

    def language_model(self, model: PreTrainedModel) -> nn.Module:
        return model.language_model.model  # type: ignore[union-attr, return-value]

    def image(self, kind: int) -> list[int]:
        rows, columns = GRIDS[kind]
        row = [SEPARATOR, *[IMAGE] * 9] * columns
        tiles = [*row[1:], BREAK] * rows if rows * columns > 1 else []
        return [*self.before, *tiles, MARK, *[IMAGE] * 9, *self.after]
