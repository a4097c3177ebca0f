"""Tiny checkpoints with random weights, as files that transformers and vLLM both load: model, tokenizer, processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% else %}PICTURE{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
)
LLM = dict(
    vocab_size=320,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=2048,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=3,
    tie_word_embeddings=False,
)
TOWER = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
CLIP = dict(**TOWER, image_size=112, patch_size=14, projection_dim=64)

makers: dict[str, Callable[[], tuple[Any, Any]]] = {}
"""By family: makes a model and its processor."""


def maker(function: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
    makers[function.__name__] = function
    return function


def make(family: str, folder: Path) -> Path:
    """Write a family's checkpoint into a folder, unless it is there."""
    if not (folder / "done").exists():
        torch.manual_seed(0)
        model, processor = makers[family]()
        spread(model)
        model.generation_config.eos_token_id = None
        model.save_pretrained(folder)
        _as_published(folder)
        processor.save_pretrained(folder)
        (folder / "done").touch()
    return folder


@torch.no_grad()
def spread(model: torch.nn.Module) -> None:
    """Weights under which pictures matter; the library's own leave every answer the same."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, 0.22 if "vis" in name else 0.15)


def _as_published(folder: Path) -> None:
    """Name the weights of CLIP towers as the checkpoints on the hub do, which vLLM reads."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    if any("vision_tower.pre_layrnorm." in name for name in weights):
        old, new = "vision_tower.", "vision_tower.vision_model."
        save_file({name.replace(old, new): value for name, value in weights.items()}, path, metadata={"format": "pt"})


def tokenizer(picture: str, *special: str) -> PreTrainedTokenizerFast:
    """One token a byte, and the special ones."""
    named = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *special]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: i for i, word in enumerate([*dict.fromkeys(named), *letters])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(list(dict.fromkeys(named)))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE.replace("PICTURE", picture),
    )


@maker
def llava() -> tuple[Any, Any]:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = tokenizer("<image>\n")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**LLM),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    pictures = CLIPImageProcessor(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112})
    processor = LlavaProcessor(
        image_processor=pictures,
        tokenizer=words,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=words.chat_template,
    )
    return LlavaForConditionalGeneration(config), processor


@maker
def llava_next() -> tuple[Any, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    words, pins = tokenizer("<image>\n"), [[112, 224], [224, 112], [224, 224]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**LLM),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_grid_pinpoints=pins,
    )
    pictures = LlavaNextImageProcessor(
        size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}, image_grid_pinpoints=pins
    )
    processor = LlavaNextProcessor(
        image_processor=pictures,
        tokenizer=words,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=words.chat_template,
    )
    return LlavaNextForConditionalGeneration(config), processor


QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen_ids(words: PreTrainedTokenizerFast) -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, words.convert_tokens_to_ids(list(QWEN)), strict=True))


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 10000.0, **more}}


@maker
def qwen2_vl() -> tuple[Any, Any]:
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    words = tokenizer(QWEN_PICTURE, *QWEN)
    config = Qwen2VLConfig(
        text_config={**LLM, **_rope()},
        vision_config=dict(depth=4, embed_dim=64, hidden_size=128, num_heads=4, mlp_ratio=2, patch_size=14),
        tie_word_embeddings=False,
        **_qwen_ids(words),
    )
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 100}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=14),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=words.chat_template,
    )
    return Qwen2VLForConditionalGeneration(config), processor


@maker
def qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    words = tokenizer(QWEN_PICTURE, *QWEN)
    vision = dict(
        depth=4,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=56,
        fullatt_block_indexes=[1, 3],
        out_hidden_size=128,
    )
    config = Qwen2_5_VLConfig(
        text_config={**LLM, **_rope()}, vision_config=vision, tie_word_embeddings=False, **_qwen_ids(words)
    )
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 100}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=14),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=words.chat_template,
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


@maker
def qwen3_vl() -> tuple[Any, Any]:
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    words = tokenizer(QWEN_PICTURE, *QWEN)
    vision = dict(
        depth=4,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=128,
        num_position_embeddings=256,
        deepstack_visual_indexes=[0, 1],
    )
    config = Qwen3VLConfig(
        text_config={**LLM, "num_hidden_layers": 4, **_rope(mrope_interleaved=True)},
        vision_config=vision,
        tie_word_embeddings=False,
        **_qwen_ids(words),
    )
    size = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 100}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=16),
        tokenizer=words,
        video_processor=Qwen3VLVideoProcessor(size=size),
        chat_template=words.chat_template,
    )
    return Qwen3VLForConditionalGeneration(config), processor


@maker
def internvl() -> tuple[Any, Any]:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    words = tokenizer("<IMG_CONTEXT>\n", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    roles = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>", "video": "<video>"}
    for role, word in roles.items():
        words.init_kwargs[f"{role}_token"] = word
        setattr(words, f"{role}_token", word)
        setattr(words, f"{role}_token_id", words.convert_tokens_to_ids(word))
    config = InternVLConfig(
        vision_config=dict(**TOWER, image_size=[112, 112], patch_size=[14, 14], layer_scale_init_value=1.0),
        text_config={k: v for k, v in LLM.items() if k != "head_dim"} | {"model_type": "qwen2"},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    square = {"height": 112, "width": 112}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=square, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=words,
        video_processor=InternVLVideoProcessor(size=square),
        image_seq_length=16,
        chat_template=words.chat_template,
    )
    return InternVLForConditionalGeneration(config), processor
