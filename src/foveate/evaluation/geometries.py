"""Real architectures with random weights, from their public configurations, and synthetic inputs for them.

Speed depends on shapes, not on what the weights know. The sizes are those of the model cards and `config.json` files
on the hub, written by hand, so that nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
    MllamaConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
)
from transformers.initialization import no_init_weights

from foveate.asking.mistake import Mistake

BEFORE, AFTER = 32, 32  # text tokens in front of the image and behind it
SHORTER = 16  # how much shorter every second sample of a padded batch is
Config = Any
Inputs = dict[str, Tensor]


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
    config = LlavaNextConfig(vision_config=_clip(None), text_config=text(), image_token_index=32000)
    _picture(config, tokens)  # refuses what no picture gives
    return config


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
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text)
    _grid(tokens)
    return config


def _llama_vision(tokens: int | None) -> MllamaConfig:
    """meta-llama/Llama-3.2-11B-Vision-Instruct: 40 layers of 4,096, 8 of them reading 4 tiles of 1,601 features."""
    if tokens not in (None, 6404):
        raise Mistake(f"--image-tokens {tokens}: Llama-3.2-Vision always reads 6404 features, 4 tiles of 1601")
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


def get_config(name: str, tokens: int | None = None) -> Config:
    """The configuration of a geometry. tokens: image tokens, None for its own number.

    Raises:
        Mistake: for an unknown name, or a number of tokens that the architecture cannot give.
    """
    if name not in GEOMETRIES:
        raise Mistake(f"no geometry {name!r}: use {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name].config(tokens)


def build(config: Config, *, device: str, dtype: str, attn: str | None, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, made in place: nothing larger than the model is ever held.

    Weights are normal with a variance of 1 / fan-in, so that logits stay finite at any depth; norms are ones.
    """
    with torch.device(device), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attn)
    model.tie_weights()
    _randomize(model, torch.Generator(device).manual_seed(seed))
    endless(model)
    return model.eval().requires_grad_(False)


def endless(model: PreTrainedModel) -> None:
    """Let no token end an answer, so that every run decodes equally many."""
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)


@torch.no_grad()
def _randomize(model: nn.Module, rng: torch.Generator) -> None:
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            weight.normal_(0, 0.02 if "embed" in name else weight[0].numel() ** -0.5, generator=rng)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)  # norms, gates, [CLS]


def synthetic(
    config: Config,
    batch: int,
    *,
    tokens: int | None = None,
    frames: int | None = None,
    padded: bool = False,
    seed: int = 0,
) -> Inputs:
    """Inputs of `generate()` on the CPU: noise for one picture or clip a sample, random words around it.

    tokens: image tokens of each picture or frame, where the architecture takes pictures of any size. frames: of a clip,
    None for a picture. padded: make every second sample shorter, and pad it on the left.

    Raises:
        Mistake: for an architecture without synthetic inputs, or a number of tokens that it cannot give.
    """
    if config.model_type not in _PICTURES:
        raise Mistake(f"no synthetic inputs for {config.model_type} models: bench takes {', '.join(_PICTURES)}")
    if frames is not None and config.model_type not in _CLIPS:
        raise Mistake(f"--frames: no synthetic clips for {config.model_type} models: use one of {', '.join(_CLIPS)}")
    rng = torch.Generator().manual_seed(seed)
    pictures = batch * (frames or 1)
    pixels, count, around = _PICTURES[config.model_type](config, pictures, tokens, rng)
    placeholder = config.image_token_id
    if frames is not None:
        pixels, placeholder = _CLIPS[config.model_type](config, pixels, frames)
        count *= frames
    words = min(config.get_text_config().vocab_size, config.image_token_id, *around)  # no special tokens
    lengths = [AFTER - SHORTER * (padded and row % 2 == 1) for row in range(batch)]
    rows = []
    for after in lengths:
        text = torch.randint(3, words, (BEFORE + after,), generator=rng)
        picture = torch.full((count,), placeholder)
        edges = [torch.tensor([edge]) for edge in around] or [torch.tensor([], dtype=torch.long)] * 2
        rows.append(torch.cat([text[:BEFORE], edges[0], picture, edges[1], text[BEFORE:]]))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    inputs = {"input_ids": ids, "attention_mask": mask, **pixels}
    if config.model_type == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == placeholder).int() * (1 if frames is None else 2)
    if config.model_type == "mllama":
        seen = (ids == config.image_token_id).cumsum(1) > 0  # the words after the image look at it
        inputs["cross_attention_mask"] = seen[:, :, None, None].expand(-1, -1, 1, config.vision_config.max_num_tiles)
        inputs["cross_attention_mask"] = inputs["cross_attention_mask"].long()
    return inputs


Pictures = tuple[Inputs, int, tuple[int, ...]]


def _llava_pixels(config: Config, batch: int, tokens: int | None, rng: torch.Generator) -> Pictures:
    vision = config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2
    if config.vision_feature_select_strategy == "full" and vision.model_type == "clip_vision_model":
        count += 1
    if tokens not in (None, count):
        raise Mistake(f"--image-tokens {tokens}: this model gives every picture {count} tokens")
    return {"pixel_values": torch.randn(batch, 3, vision.image_size, vision.image_size, generator=rng)}, count, ()


def _picture(config: Config, tokens: int | None) -> tuple[int, int, int]:
    """Height, width and tokens of a LLaVA-NeXT picture that fills its tiles; None asks for the most tokens."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    counts = {}
    for height, width in config.image_grid_pinpoints:
        rows, columns = (edge // config.vision_config.image_size * side for edge in (height, width))
        counts[side * side + rows * (columns + 1)] = (height, width)
    count = max(counts) if tokens is None else tokens
    if count not in counts:
        raise Mistake(f"--image-tokens {tokens}: tiles give {', '.join(map(str, sorted(counts)))} (newlines included)")
    return *counts[count], count


def _llava_next_pixels(config: Config, batch: int, tokens: int | None, rng: torch.Generator) -> Pictures:
    height, width, count = _picture(config, tokens)
    edge = config.vision_config.image_size
    tiles = 1 + (height // edge) * (width // edge)
    pixels = torch.randn(batch, tiles, 3, edge, edge, generator=rng)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]] * batch)}, count, ()


def _grid(tokens: int | None) -> tuple[int, int]:
    """Rows and columns of a picture with so many tokens, as square as it can be."""
    tokens = tokens or 1296
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    if tokens > 4 * rows * rows:
        square = math.isqrt(tokens) ** 2
        raise Mistake(f"--image-tokens {tokens} makes no picture of a usual shape: use {square} or {square + 4}")
    return rows, tokens // rows


def _qwen_pixels(config: Config, batch: int, tokens: int | None, rng: torch.Generator) -> Pictures:
    vision, (rows, columns) = config.vision_config, _grid(tokens)
    merge = vision.spatial_merge_size
    patches = batch * rows * columns * merge * merge
    pixels = torch.randn(patches, 3 * vision.temporal_patch_size * vision.patch_size**2, generator=rng)
    grid = torch.tensor([[1, rows * merge, columns * merge]] * batch)
    around = (config.vision_start_token_id, config.vision_end_token_id)
    return {"pixel_values": pixels, "image_grid_thw": grid}, rows * columns, around


def _mllama_pixels(config: Config, batch: int, tokens: int | None, rng: torch.Generator) -> Pictures:
    vision = config.vision_config
    tiles, edge = vision.max_num_tiles, vision.image_size
    ratio = 1 + next(i for i, (x, y) in enumerate(vision.supported_aspect_ratios) if x * y == tiles and x > 1 < y)
    pixels = {
        "pixel_values": torch.randn(batch, 1, tiles, 3, edge, edge, generator=rng),
        "aspect_ratio_ids": torch.full((batch, 1), ratio),
        "aspect_ratio_mask": torch.ones(batch, 1, tiles, dtype=torch.long),
    }
    return pixels, 1, ()


_PICTURES: dict[str, Callable[[Config, int, int | None, torch.Generator], Pictures]] = {
    "llava": _llava_pixels,
    "llava_next": _llava_next_pixels,
    "qwen2_5_vl": _qwen_pixels,
    "mllama": _mllama_pixels,
}


def _qwen_clip(config: Config, pixels: Inputs, frames: int) -> tuple[Inputs, int]:
    grids = pixels["image_grid_thw"][::frames].clone()
    grids[:, 0] = frames
    return {"pixel_values_videos": pixels["pixel_values"], "video_grid_thw": grids}, config.video_token_id


# What the pixels of frames become as clips, and the placeholder; where frames are pictures they stay what they are.
_CLIPS: dict[str, Callable[[Config, Inputs, int], tuple[Inputs, int]]] = {
    "llava": lambda config, pixels, frames: (pixels, config.image_token_id),
    "qwen2_5_vl": _qwen_clip,
}
