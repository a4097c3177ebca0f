"""The configurations of published architectures, written by hand from model cards and `config.json` on the hub."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
    MllamaConfig,
    Qwen2_5_VLConfig,
)

from foveate.asking.mistake import Mistake

Config = Any


@dataclass(frozen=True)
class Geometry:
    """An architecture. config: makes its configuration for a number of image tokens (None: as published)."""

    summary: str
    config: Callable[[int | None], Config]


def _clip(tokens: int | None) -> CLIPVisionConfig:
    """CLIP ViT-L/14 at 336 pixels (openai/clip-vit-large-patch14-336), or with a picture of `tokens` patches."""
    side = math.isqrt(tokens or 576)
    if side * side != (tokens or 576):
        raise Mistake(f"--image-tokens {tokens}: this encoder sees squares: use {side * side} or {(side + 1) ** 2}")
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=14 * side,
        patch_size=14,
        projection_dim=768,
    )


def _vicuna() -> LlamaConfig:
    """Vicuna 7B as LLaVA carries it (llava-hf/llava-1.5-7b-hf): 32 layers of 4,096, 32 heads, no grouping."""
    return LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
    )


def _mistral() -> MistralConfig:
    """Mistral 7B v0.2 as LLaVA-NeXT carries it: 32 layers of 4,096, 32 heads on 8 KV heads, full attention."""
    return MistralConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def _llama_1b() -> LlamaConfig:
    """Llama-3.2-1B: 16 layers of 2,048, 32 heads on 8 KV heads; its rope scaling, which costs nothing, left out."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )


def _llava(text: Callable[[], Any], tokens: int | None, **options: Any) -> LlavaConfig:
    return LlavaConfig(vision_config=_clip(tokens), text_config=text(), image_token_index=32000, **options)


def _llava_next(text: Callable[[], Any], tokens: int | None) -> LlavaNextConfig:
    return LlavaNextConfig(vision_config=_clip(None), text_config=text(), image_token_index=32000)


def _qwen(tokens: int | None) -> Qwen2_5_VLConfig:
    """Qwen/Qwen2.5-VL-7B-Instruct: 28 layers of 3,584, 28 heads on 4 KV heads; windowed encoder of 32 layers."""
    vision = dict(hidden_size=1280, intermediate_size=3420, depth=32, num_heads=16, out_hidden_size=3584)
    text = dict(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=128000,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text)


def _llama_vision(tokens: int | None) -> MllamaConfig:
    """meta-llama/Llama-3.2-11B-Vision-Instruct: 40 layers of 4,096, 8 of them reading 4 tiles of 1,601 features."""
    vision = dict(
        image_size=560, max_num_tiles=4, vision_output_dim=7680, intermediate_layers_indices=[3, 7, 15, 23, 30]
    )
    text = dict(num_hidden_layers=40, hidden_size=4096, cross_attention_layers=[3, 8, 13, 18, 23, 28, 33, 38])
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=128256)


def _tiny(tokens: int | None) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=4 * math.isqrt(tokens or 36),
        patch_size=4,
        projection_dim=32,
    )
    text = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=95)


GEOMETRIES: dict[str, Geometry] = {
    "llava-1.5-7b": Geometry("CLIP-L/14-336, Vicuna 7B, 576 image tokens", lambda n: _llava(_vicuna, n)),
    "llava-next-7b": Geometry(
        "CLIP-L/14-336, Vicuna 7B, 5 tiles: 2,880 image tokens and 48 newlines", lambda n: _llava_next(_vicuna, n)
    ),
    "llava-next-mistral-7b": Geometry(
        "CLIP-L/14-336, Mistral 7B, 5 tiles: 2,880 image tokens and 48 newlines", lambda n: _llava_next(_mistral, n)
    ),
    "qwen2.5-vl-7b": Geometry("windowed encoder, Qwen2.5 7B, 1,296 image tokens", _qwen),
    "llama-3.2-11b-vision": Geometry("Llama 8B and 8 cross-attention layers, 6,404 image features", _llama_vision),
    "1b": Geometry(
        "CLIP-L/14-336, Llama-3.2-1B, 576 image tokens", lambda n: _llava(_llama_1b, n, tie_word_embeddings=True)
    ),
    "tiny": Geometry("for tests: 3 and 4 layers, 36 image tokens", _tiny),
}
