"""Kimi K2.5: patches come as pictures, and the cache is latent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import LLM, PATCH, VIDEO, VISION_END, VISION_START, moving
from .paddleocr_vl import PatchPictures
from .qwen2_5_vl import TOKENS

# Of the films' parts how many pictures join into each, and (h, w) in patches.
FILMS = [((4, 4, 2), 8, 12), ((4, 1), 8, 8), ((3, 3, 2), 12, 8), ((4, 4), 8, 12)]


class KimiK25(PatchPictures):
    name, types = "kimi_k25", ()

    def clip(self, kind: int) -> list[int]:
        parts, h, w = FILMS[kind]
        return [h * w // 4] * len(parts)

    def film(self, kind: int) -> list[int]:
        """A part at a time, each behind when it is shown."""
        parts = [[3 + i, VISION_START, *[VIDEO] * n, VISION_END] for i, n in enumerate(self.clip(kind))]
        return [token for part in parts for token in part]

    def films(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        films = [FILMS[kind] for kind in kinds]
        patches = [moving(sum(parts), h * w, self.values, rng) for parts, h, w in films]
        grids = torch.tensor([(t, h, w) for parts, h, w in films for t in parts])
        return {"pixel_values_videos": torch.cat(patches).view(-1, 3, PATCH, PATCH), "video_grid_thw": grids}

    def options(self) -> dict[str, Any]:
        vision = dict(
            patch_size=PATCH,
            pos_emb_height=12,
            pos_emb_width=12,
            num_attention_heads=2,
            num_hidden_layers=3,
            hidden_size=32,
            intermediate_size=48,
        )
        latent = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
        experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1)
        text = dict(model_type="deepseek_v3", num_key_value_heads=4, moe_intermediate_size=32, first_k_dense_replace=1)
        text = LLM | latent | experts | text
        return dict(vision_config=vision, text_config=text, projection_hidden_size=32, **TOKENS)
