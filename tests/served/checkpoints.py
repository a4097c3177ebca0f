"""Tiny checkpoints with random weights, as files that transformers and vLLM both load: model, tokenizer, processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% else %}PICTURE{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
)
# Not those of foveate.testing: vLLM's kernels have no heads as narrow.
LLM: dict[str, Any] = dict(
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
TOWER: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
CLIP: dict[str, Any] = dict(**TOWER, image_size=112, patch_size=14, projection_dim=64)
Made = tuple[Any, Any]
"""A model and its processor."""

makers: dict[str, Callable[[], Made]] = {}
"""By family."""


def maker(function: Callable[[], Made]) -> Callable[[], Made]:
    makers[function.__name__] = function
    return function


def make(family: str, folder: Path) -> Path:
    """Write a family's checkpoint into a folder, unless it is there."""

    def made() -> Made:
        model, processor = makers[family]()
        spread(model)
        return model, processor

    return write(made, folder)


def write(made: Callable[[], Made], folder: Path) -> Path:
    """Write a checkpoint into a folder, unless it is there."""
    if not (folder / "done").exists():
        torch.manual_seed(0)
        model, processor = made()
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
    """Name the weights of CLIP and SigLIP towers as the checkpoints on the hub do, which vLLM reads."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    if any("vision_tower.encoder.layers." in name for name in weights):
        old, new = "vision_tower.", "vision_tower.vision_model."
        save_file({name.replace(old, new): value for name, value in weights.items()}, path, metadata={"format": "pt"})


def tokenizer(picture: str, *special: str) -> PreTrainedTokenizerFast:
    """One token a byte, and the special ones. picture: what a chat's template writes for one."""
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


def name_roles(words: PreTrainedTokenizerFast, **roles: str) -> None:
    """Give special tokens the names by which a processor asks for them."""
    for role, word in roles.items():
        words.init_kwargs[f"{role}_token"] = word
        setattr(words, f"{role}_token", word)
        setattr(words, f"{role}_token_id", words.convert_tokens_to_ids(word))


def llava_of(vision: dict[str, Any], text: dict[str, Any]) -> Made:
    """A LLaVA-1.5 of these sizes."""
    words, side = tokenizer("<image>\n"), vision["image_size"]
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return transformers.LlavaForConditionalGeneration(config), transformers.LlavaProcessor(pictures, words, **_CLIPS)


# What the processors of LLaVA are told of a CLIP, whose [CLS] token is dropped.
_CLIPS: dict[str, Any] = dict(
    patch_size=14,
    vision_feature_select_strategy="default",
    image_token="<image>",
    num_additional_image_tokens=1,
    chat_template=TEMPLATE.replace("PICTURE", "<image>\n"),
)


@maker
def llava() -> Made:
    return llava_of(CLIP, LLM)


PINS = [[112, 224], [224, 112], [224, 224]]


@maker
def llava_next() -> Made:
    words = tokenizer("<image>\n")
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP),
        text_config=transformers.LlamaConfig(**LLM),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_grid_pinpoints=PINS,
    )
    pictures = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}, image_grid_pinpoints=PINS
    )
    processor = transformers.LlavaNextProcessor(pictures, words, **_CLIPS)
    return transformers.LlavaNextForConditionalGeneration(config), processor


QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen(kind: str, vision: dict[str, Any], patch: int = 14, text: dict[str, Any] | None = None, **rope: Any) -> Made:
    """kind: what the classes are called. text: sizes of the LLM that are not `LLM`'s."""
    words = tokenizer(QWEN_PICTURE, *QWEN)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    rope = {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 10000.0, **rope}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**LLM, "rope_parameters": rope, **(text or {})},
        vision_config={"depth": 4, "num_heads": 4, "patch_size": patch, **vision},
        tie_word_embeddings=False,
        **dict(zip(names, words.convert_tokens_to_ids(list(QWEN)), strict=True)),
    )
    token = (2 * patch) ** 2  # pixels
    size = {"shortest_edge": token * 4, "longest_edge": token * 100}
    films = "Qwen3VL" if kind == "Qwen3VL" else "Qwen2VL"
    processor = getattr(transformers, f"{kind}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(size=size, patch_size=patch),
        tokenizer=words,
        video_processor=getattr(transformers, f"{films}VideoProcessor")(size=size),
        chat_template=words.chat_template,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor


@maker
def qwen2_vl() -> Made:
    return _qwen("Qwen2VL", dict(embed_dim=64, hidden_size=128, mlp_ratio=2))


MERGED: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=128, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=128
)


@maker
def qwen2_5_vl() -> Made:
    return _qwen("Qwen2_5_VL", MERGED | dict(window_size=56, fullatt_block_indexes=[1, 3]))


@maker
def qwen3_vl() -> Made:
    vision = MERGED | dict(num_position_embeddings=256, deepstack_visual_indexes=[0, 1])
    return _qwen("Qwen3VL", vision, patch=16, text={"num_hidden_layers": 4}, mrope_interleaved=True)


@maker
def internvl() -> Made:
    words = tokenizer("<IMG_CONTEXT>\n", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    name_roles(words, start_image="<img>", end_image="</img>", context_image="<IMG_CONTEXT>", video="<video>")
    config = transformers.InternVLConfig(
        vision_config=dict(**TOWER, image_size=[112, 112], patch_size=[14, 14], layer_scale_init_value=1.0),
        text_config={k: v for k, v in LLM.items() if k != "head_dim"} | {"model_type": "qwen2"},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    square = {"height": 112, "width": 112}
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size=square, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=words,
        video_processor=transformers.InternVLVideoProcessor(size=square),
        image_seq_length=16,
        chat_template=words.chat_template,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def _idefics3(kind: str, **more: Any) -> Made:
    """kind: what the classes are called. more: of the processor."""
    named = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    words = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *named)
    config = getattr(transformers, f"{kind}Config")(
        vision_config=dict(**TOWER, image_size=112, patch_size=14),
        text_config={**LLM, "model_type": "llama"},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=3,
        tie_word_embeddings=False,
    )
    pictures = getattr(transformers, f"{kind}ImageProcessor")(
        size={"longest_edge": 224}, max_image_size={"longest_edge": 112}
    )
    processor = getattr(transformers, f"{kind}Processor")(
        pictures, words, image_seq_len=16, chat_template=words.chat_template, **more
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor


@maker
def idefics3() -> Made:
    return _idefics3("Idefics3")


@maker
def smolvlm() -> Made:
    return _idefics3("SmolVLM", video_processor=transformers.SmolVLMVideoProcessor())


@maker
def llava_onevision() -> Made:
    """A small encoder: the crops of large pictures are shrunk from nine of its squares on."""
    words = tokenizer("<image>\n", "<video>")
    square, pins = {"height": 56, "width": 56}, [[56 * h, 56 * w] for h in range(1, 5) for w in range(1, 5)]
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=56, patch_size=14, vision_use_head=False),
        text_config=transformers.Qwen2Config(**{k: v for k, v in LLM.items() if k != "head_dim"}),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pins,
        tie_word_embeddings=False,
    )
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=pins),
        words,
        transformers.LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=words.chat_template,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


@maker
def mistral3() -> Made:
    roles = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    words = tokenizer("[IMG]", *roles.values())
    config = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**TOWER, head_dim=16, image_size=168, patch_size=14),
        text_config=transformers.MistralConfig(**LLM, sliding_window=None),
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
    )
    processor = transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(size={"longest_edge": 168}, patch_size={"height": 28, "width": 28}),
        words,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=words.chat_template,
        **roles,
    )
    return transformers.Mistral3ForConditionalGeneration(config), processor
