"""Qwen3.5: every other decoder layer carries a state."""

from __future__ import annotations

from typing import Any

from .base import LLM
from .qwen2_5_vl import TOKENS, mrope
from .qwen3_vl import VISION, Stamped

STATE = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)


def hybrid(layers: int) -> dict:
    """The decoder, of so many layers."""
    types = ["linear_attention", "full_attention"] * (layers // 2)
    positions = mrope(1, 1, 0, mrope_interleaved=True, partial_rotary_factor=0.25)
    return LLM | STATE | dict(num_hidden_layers=layers, head_dim=16, layer_types=types, rope_parameters=positions)


class Qwen35(Stamped):
    name = "qwen3_5"
    rounding = 5.0  # a recurrence goes by chunks, which are cut elsewhere where tokens are gone

    def options(self) -> dict[str, Any]:
        return dict(vision_config=VISION, text_config=hybrid(6), **TOKENS)


class Qwen35Moe(Qwen35):
    name = "qwen3_5_moe"

    def options(self) -> dict[str, Any]:
        experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
        text = hybrid(6) | experts | dict(shared_expert_intermediate_size=32)
        return super().options() | dict(text_config=text)
