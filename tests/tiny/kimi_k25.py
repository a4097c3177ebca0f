"""Kimi K2.5: patches come as pictures, and the cache is latent."""

from .base import LLM, PATCH
from .paddleocr_vl import PatchPictures
from .qwen2_5_vl import TOKENS


class KimiK25(PatchPictures):
    name, types = "kimi_k25", ()

    def clip(self, kind):
        return []  # frames of videos join

    def options(self):
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
