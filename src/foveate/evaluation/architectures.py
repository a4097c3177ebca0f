"""The configurations of published architectures, written by hand from model cards and `config.json` on the hub.

Those from Qwen2.5-VL-3B to SmolVLM2 are from memory; their numbers of parameters are those that the hub shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    MllamaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

from foveate.asking.mistake import Mistake

Config = Any


@dataclass(frozen=True)
class Geometry:
    """An architecture. config: makes its configuration for a number of image tokens (None: as published)."""

    summary: str
    config: Callable[[int | None], Config]


def _side(tokens: int) -> int:
    """Tokens along one side of a square picture."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise Mistake(f"--image-tokens {tokens}: this encoder sees squares: use {side * side} or {(side + 1) ** 2}")
    return side


def _clip(tokens: int | None) -> CLIPVisionConfig:
    """CLIP ViT-L/14 at 336 pixels (openai/clip-vit-large-patch14-336), or with a picture of `tokens` patches."""
    side = _side(tokens or 576)
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


def _qwen2_5_vl(width: int, layers: int, heads: int, kv: int, inner: int, vocabulary: int, tied: bool) -> Config:
    """Qwen/Qwen2.5-VL-*B-Instruct: the windowed encoder of 32 layers, and Qwen2.5."""
    vision = dict(hidden_size=1280, intermediate_size=3420, depth=32, num_heads=16, out_hidden_size=width)
    text = dict(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=128000,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied)


def _qwen3(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    """A decoder of Qwen3: 8 KV heads, of 128 whatever its width."""
    return dict(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
    )


def _qwen3_vl(vision: dict[str, Any], text: dict[str, Any], tied: bool) -> Qwen3VLConfig:
    """Qwen/Qwen3-VL-*B-Instruct: features of three encoder layers join the first layers of the decoder."""
    mrope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = text | dict(max_position_embeddings=262144, rope_parameters=mrope)
    vision = dict(num_heads=16, out_hidden_size=text["hidden_size"], **vision)
    return Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied)


# Their encoders: of the 8B model and larger, and of the smaller ones.
_LARGE = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])
_SMALL = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])


def _internvl() -> InternVLConfig:
    """OpenGVLab/InternVL3_5-8B-HF: InternViT-300M, 256 tokens a tile of 448 pixels, and Qwen3-8B."""
    text = Qwen3Config(**_qwen3(4096, 36, 32, 12288), max_position_embeddings=40960)
    vision = dict(attention_bias=True)  # its sizes are the class's own
    return InternVLConfig(vision_config=vision, text_config=text, image_token_id=151671, tie_word_embeddings=False)


def _so400m(pixels: int, layers: int = 27) -> SiglipVisionConfig:
    """SigLIP SO400M/14, without its pooling head."""
    return SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=pixels,
        patch_size=14,
        vision_use_head=False,
    )


def _llava_onevision() -> LlavaOnevisionConfig:
    """llava-hf/llava-onevision-qwen2-7b-ov-hf: SigLIP without its last layer, 729 tokens a tile, and Qwen2-7B."""
    text = Qwen2Config(
        vocab_size=152000,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return LlavaOnevisionConfig(vision_config=_so400m(384, layers=26), text_config=text, image_token_index=151646)


def _smolvlm2() -> SmolVLMConfig:
    """HuggingFaceTB/SmolVLM2-2.2B-Instruct: SigLIP, 3 x 3 patches a token, and SmolLM2-1.7B."""
    vision = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
    text = LlamaConfig(
        vocab_size=49280,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 130000.0},
    )
    return SmolVLMConfig(
        vision_config=vision | dict(image_size=384, patch_size=14),
        text_config=text,
        scale_factor=3,
        image_token_id=49190,
    )


def _gemma3_text(width: int, layers: int, heads: int, kv: int, inner: int, window: int) -> dict[str, Any]:
    """A decoder of Gemma 3: heads of 256, windows in five of six layers; its rope scaling left out."""
    return dict(
        vocab_size=262208,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=window,
    )


def _gemma3() -> Gemma3Config:
    """google/gemma-3-12b-it: SigLIP at 896 pixels, 4 x 4 of whose 4,096 patches are pooled to each of 256 tokens."""
    text = _gemma3_text(3840, 48, 16, 8, 15360, window=1024)
    return Gemma3Config(vision_config=_so400m(896), text_config=text, mm_tokens_per_image=256)


def _gemma3_1b(tokens: int | None) -> Gemma3Config:
    """No published model: the decoder of google/gemma-3-1b-it, behind SigLIP-B/14 with 2 x 2 patches a token.

    576 tokens, so that a prompt is longer than the window of 512.
    """
    side = _side(tokens or 576)
    vision = SiglipVisionConfig(image_size=28 * side, patch_size=14, vision_use_head=False)  # B is the class's own size
    text = _gemma3_text(1152, 26, 4, 1, 6912, window=512)
    return Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=side * side)


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
    "llava-onevision-7b": Geometry(
        "SigLIP, Qwen2 7B, 5 tiles: 3,645 image tokens and 54 newlines", lambda n: _llava_onevision()
    ),
    "qwen2.5-vl-3b": Geometry(
        "windowed encoder, Qwen2.5 3B, 1,296 image tokens",
        lambda n: _qwen2_5_vl(2048, 36, 16, 2, 11008, 151936, tied=True),
    ),
    "qwen2.5-vl-7b": Geometry(
        "windowed encoder, Qwen2.5 7B, 1,296 image tokens",
        lambda n: _qwen2_5_vl(3584, 28, 28, 4, 18944, 152064, tied=False),
    ),
    "qwen3-vl-8b": Geometry(
        "DeepStack, Qwen3 8B, 1,296 image tokens",
        lambda n: _qwen3_vl(_LARGE, _qwen3(4096, 36, 32, 12288), tied=False),
    ),
    "qwen3-vl-2b": Geometry(
        "DeepStack, Qwen3 1.7B, 1,296 image tokens", lambda n: _qwen3_vl(_SMALL, _qwen3(2048, 28, 16, 6144), tied=True)
    ),
    "qwen3-vl-1b": Geometry(
        "made up: DeepStack, Qwen3 0.6B, 1,296 image tokens",
        lambda n: _qwen3_vl(_SMALL, _qwen3(1024, 28, 16, 3072), tied=True),
    ),
    "internvl3.5-8b": Geometry("InternViT, Qwen3 8B, 5 tiles: 1,280 image tokens", lambda n: _internvl()),
    "gemma3-12b": Geometry("SigLIP, Gemma 3 12B, 256 image tokens", lambda n: _gemma3()),
    "gemma3-1b": Geometry("made up: SigLIP-B, Gemma 3 1B, 576 image tokens", _gemma3_1b),
    "smolvlm2-2.2b": Geometry("SigLIP, SmolLM2 1.7B, 17 tiles: 1,377 image tokens", lambda n: _smolvlm2()),
    "llama-3.2-11b-vision": Geometry("Llama 8B and 8 cross-attention layers, 6,404 image features", _llama_vision),
    "1b": Geometry(
        "CLIP-L/14-336, Llama-3.2-1B, 576 image tokens", lambda n: _llava(_llama_1b, n, tie_word_embeddings=True)
    ),
    "tiny": Geometry("for tests: 3 and 4 layers, 36 image tokens", _tiny),
}
