"""Tiny random models of every supported family, and inputs for them, made from configs alone.

No hub, no processor files: pixels are noise, text is random ids, and the number of placeholders comes from
the processor code of transformers itself. Every input dict goes straight into ``model.generate(**inputs)``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence
from functools import cache, partial
from itertools import count
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

# What this release of transformers calls the KV cache.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "mllama")
DECODER_FAMILIES = FAMILIES[:3]  # image tokens sit in the prompt; mllama looks at them through cross-attention

PAD, TEXT, VOCAB = 0, 90, 96  # text ids are 1..89, so that nothing special appears by accident
VISION_START, VISION_END, VIDEO, IMAGE = 92, 93, 94, 95
PATCH, MAX_TILES = 4, 4
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
LLM = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
)

# What the n-th image of a batch looks like (cycled), so that neighbours differ in size.
NEXT_SIZES = [(30, 20), (12, 44), (31, 31), (40, 14)]  # (height, width): other tilings, other unpadding
QWEN_GRIDS = [(1, 8, 12), (1, 12, 8), (1, 12, 12), (1, 8, 4)]  # (t, h, w) in patches, merged 2 x 2
MLLAMA_RATIOS = [
    2,
    5,
    6,
    1,
]  # ids of [1, 2], [2, 1], [2, 2], [1, 1] in `supported_aspect_ratios`, offset by 1
MLLAMA_TILES = [2, 2, 4, 1]


VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


def _clip(image_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(**VISION, image_size=image_size, patch_size=PATCH, projection_dim=32)


# Other encoders and decoders in the architecture of LLaVA, as the hub has them. Build them by these names; their
# inputs are those of "llava", but "llava_cls" hands its [CLS] token to the LLM as a 37th image token.
VARIANTS = ("llava_siglip", "llava_cls", "llava_mistral", "llava_qwen2", "llava_sliding", "llava_windows")


def _variant(name: str) -> LlavaConfig:
    vision, text, options = _clip(24), LlamaConfig(**LLM), {}
    if name in ("llava_siglip", "llava_cls"):
        options["vision_feature_select_strategy"] = "full"
    if name == "llava_siglip":
        vision = SiglipVisionConfig(**{k: getattr(vision, k) for k in VISION}, image_size=24, patch_size=PATCH)
    if name in ("llava_mistral", "llava_sliding"):
        text = MistralConfig(**LLM, sliding_window=8 if name == "llava_sliding" else None)
    if name == "llava_windows":  # in every other layer
        kinds = ["sliding_attention", "full_attention"] * 2
        text = Qwen2Config(**LLM, use_sliding_window=True, sliding_window=12, layer_types=kinds)
    if name == "llava_qwen2":
        text = Qwen2Config(**LLM)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, **options)


def config(family: str):
    if family in VARIANTS:
        return _variant(family)
    if family == "llava":  # 6 x 6 tokens an image
        return LlavaConfig(vision_config=_clip(24), text_config=LlamaConfig(**LLM), image_token_index=IMAGE)
    if family == "llava_next":  # 4 x 4 tokens a tile
        return LlavaNextConfig(
            vision_config=_clip(16),
            text_config=LlamaConfig(**LLM),
            image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS,
        )
    if family == "qwen2_5_vl":
        vision = dict(
            depth=4,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            patch_size=PATCH,
            window_size=16,  # windows of 2 x 2 merged tokens, of 4 x 4 patches
            fullatt_block_indexes=[1, 3],
            out_hidden_size=LLM["hidden_size"],
        )
        text = {**LLM, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
        tokens = dict(
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
        )
        return Qwen2_5_VLConfig(vision_config=vision, text_config=text, **tokens)
    if family == "mllama":  # 17 features a tile (16 patches and the CLS)
        vision = dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_global_layers=1,
            attention_heads=2,
            image_size=16,
            patch_size=PATCH,
            max_num_tiles=MAX_TILES,
            intermediate_layers_indices=[0, 2],
            vision_output_dim=96,
        )
        text = {
            **LLM,
            "num_hidden_layers": 6,
            "cross_attention_layers": [1, 3, 5],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
        return MllamaConfig(vision_config=vision, text_config=text, image_token_index=VOCAB)
    raise ValueError(f"no tiny model for {family!r}")


CLASSES: dict[str, type[PreTrainedModel]] = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "mllama": MllamaForConditionalGeneration,
}


@torch.no_grad()
def _randomize(model: nn.Module, seed: int, peak: float) -> None:
    """Weights under which attention and images matter; the library's 0.02 makes every model near-constant."""
    rng = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=rng) * std

    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            p.copy_(1 + noise(p, 0.1))
        elif "gate" in name and p.numel() == 1:  # mllama's gates start at zero, which would hide the images
            p.fill_(0.8)
        elif p.ndim >= 2 and "embed" not in name:
            p.copy_(noise(p, p[0].numel() ** -0.5))
        else:
            p.copy_(noise(p, 0.1 if name.endswith("bias") else 0.5))
        if any(part in name for part in ("q_proj.w", "k_proj.w", "q_norm", "k_norm")):
            p.mul_(peak)
        elif name.endswith("qkv.weight"):
            p[: p.shape[0] * 2 // 3].mul_(peak)


@cache
def _template(family: str, seed: int, peak: float) -> PreTrainedModel:
    model = CLASSES.get(family, LlavaForConditionalGeneration)(config(family)).eval().requires_grad_(False)
    _randomize(model, seed, peak)
    # No end token: all steps run.
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=None, bos_token_id=1)
    return model


def build(family: str, attn: str = "sdpa", seed: int = 0, peak: float = 1.5) -> PreTrainedModel:
    """Return a fresh fp32 model; equal arguments (whatever `attn`) give equal weights."""
    model = copy.deepcopy(_template(family, seed, peak))
    model.set_attn_implementation(attn)
    return model


def _placeholders(family: str, kind: int) -> int:
    """Return how many image tokens the processor writes into the prompt for an image of this kind."""
    if family.startswith("llava") and family != "llava_next":
        return 37 if family == "llava_cls" else 36
    if family == "llava_next":
        this = SimpleNamespace(
            image_processor=SimpleNamespace(image_grid_pinpoints=PINPOINTS),
            patch_size=PATCH,
            num_additional_image_tokens=1,
            _get_unpadded_features=partial(LlavaNextProcessor._get_unpadded_features, None),
        )
        return LlavaNextProcessor._get_number_of_features(this, *NEXT_SIZES[kind], 16, 16) - 1  # without the CLS
    if family == "qwen2_5_vl":
        t, h, w = QWEN_GRIDS[kind]
        return t * h * w // 4
    return 1


def _pixels(family: str, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
    def noise(*shape: int) -> Tensor:
        # Smooth and rough parts, so that patches of one picture differ from each other.
        return torch.randn(shape, generator=rng) * torch.rand((*shape[:-2], 1, 1), generator=rng).mul(2)

    if family.startswith("llava") and family != "llava_next":
        return {"pixel_values": torch.cat([noise(1, 3, 24, 24) for _ in kinds])}
    if family == "llava_next":
        sizes = [NEXT_SIZES[k] for k in kinds]
        tiles = [image_size_to_num_patches(s, PINPOINTS, 16) for s in sizes]
        pixels = torch.zeros(len(sizes), max(tiles), 3, 16, 16)
        for i, n in enumerate(tiles):
            pixels[i, :n] = noise(n, 3, 16, 16)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    grids = torch.tensor([QWEN_GRIDS[k] for k in kinds])
    patches = [torch.randn(n, 3 * 2 * PATCH**2, generator=rng) for n in grids.prod(1).tolist()]
    return {"pixel_values": torch.cat(patches), "image_grid_thw": grids}


def _mllama_pixels(ids: Tensor, kinds: Sequence[Sequence[int]], rng: torch.Generator) -> dict[str, Tensor]:
    most = max(1, *map(len, kinds))
    batch = len(kinds)
    ratio_ids = torch.zeros(batch, most, dtype=torch.long)
    tile_mask = torch.zeros(batch, most, MAX_TILES, dtype=torch.long)
    tile_mask[:, :, 0] = 1  # the image processor marks the first tile of a padding image, too
    pixels = torch.zeros(batch, most, MAX_TILES, 3, 16, 16)
    for b, row in enumerate(kinds):
        for i, kind in enumerate(row):
            n = MLLAMA_TILES[kind]
            ratio_ids[b, i] = MLLAMA_RATIOS[kind]
            tile_mask[b, i, :n] = 1
            pixels[b, i, :n] = torch.randn(n, 3, 16, 16, generator=rng)
    mask = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(row, VOCAB) for row in ids.tolist()],
        [[MLLAMA_TILES[k] for k in row] for row in kinds],
        MAX_TILES,
        ids.shape[1],
    )
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": ratio_ids,
        "aspect_ratio_mask": tile_mask,
        "cross_attention_mask": torch.from_numpy(mask),
    }


def inputs(
    family: str, images: Sequence[int] = (1,), text: Sequence[int] = (6,), seed: int = 0, between: int = 2
) -> dict[str, Tensor]:
    """Return a left-padded batch: row b has `images[b]` images and ends with `text[b]` words.

    Every image is followed by `between` words. Successive images differ in kind, from kind `seed % 4` on.
    """
    rng = torch.Generator().manual_seed(1000 + seed)

    def words(n: int) -> list[int]:
        return torch.randint(3, TEXT, (n,), generator=rng).tolist()

    token = VOCAB if family == "mllama" else IMAGE
    around = ([VISION_START], [VISION_END]) if family == "qwen2_5_vl" else ([], [])
    rows, kinds, next_kind = [], [], count(seed)
    for n_images, n_words in zip(images, text, strict=True):
        row, row_kinds = words(2), []
        for _ in range(n_images):
            row_kinds.append(next(next_kind) % 4)
            row += around[0] + [token] * _placeholders(family, row_kinds[-1]) + around[1] + words(between)
        rows.append(row + words(n_words))
        kinds.append(row_kinds)

    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask}
    if family == "mllama" and any(images):
        return batch | _mllama_pixels(ids, kinds, rng)
    if family == "qwen2_5_vl":
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    flat = [kind for row in kinds for kind in row]
    return batch | _pixels(family, flat, rng) if flat else batch


BATCHES = {
    "one": dict(images=(1,), text=(6,)),
    "ragged": dict(images=(1, 2, 1), text=(4, 9, 2)),  # left-padded
}


def image_counts(family: str, images: Iterable[int], seed: int = 0) -> list[list[int]]:
    """Return how many tokens each image of `inputs(family, images, seed=seed)` has.

    For mllama: how many features, without those of padded tiles.
    """
    kind = count(seed)

    def tokens(kind: int) -> int:
        return 17 * MLLAMA_TILES[kind] if family == "mllama" else _placeholders(family, kind)

    return [[tokens(next(kind) % 4) for _ in range(n)] for n in images]


def next_turn(
    model: PreTrainedModel, batch: dict[str, Tensor], sequences: Tensor, image: bool = False, seed: int = 50
) -> dict[str, Tensor]:
    """Return what `generate` needs, beside the cache, to go on after `sequences` with words or an image."""
    family = model.config.model_type
    rows, length = len(sequences), sequences.shape[1]
    new = inputs(family, (1,) * rows if image else (0,) * rows, (4,) * rows, seed)
    ids = torch.cat([sequences, new["input_ids"]], 1)
    mask = torch.cat([batch["attention_mask"], new["attention_mask"].new_ones(rows, ids.shape[1])], 1)
    turn = new | {"input_ids": ids, "attention_mask": mask[:, : ids.shape[1]]}
    if family == "mllama":
        seen = batch["cross_attention_mask"]
        since = seen[:, -1:].expand(-1, ids.shape[1] - seen.shape[1], -1, -1)
        if image:  # as the processor does: text looks at the image in front of it, and no longer at earlier ones
            since = since.clone()
            since[:, length - seen.shape[1] :] = 0
            fresh = torch.nn.functional.pad(new["cross_attention_mask"], (0, 0, 0, 0, length, 0))
            turn["cross_attention_mask"] = torch.cat([torch.cat([seen, since], 1), fresh], 2)
        else:
            turn["cross_attention_mask"] = torch.cat([seen, since], 1)
    if family == "qwen2_5_vl":
        types = turn.pop("mm_token_type_ids")
        if image:  # transformers wants the grids of the whole talk for positions, of the new image for features
            pad = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, length - batch["input_ids"].shape[1]))
            per_row = (batch["input_ids"] == VISION_START).sum(1).tolist()
            grids = zip(batch["image_grid_thw"].split(per_row), new["image_grid_thw"].split(1), strict=True)
            vision, _ = model.model.get_rope_index(
                ids,
                torch.cat([pad, types], 1),
                torch.cat([grid for row in grids for grid in row]),
                attention_mask=turn["attention_mask"],
            )
            text = turn["attention_mask"].cumsum(1) - 1
            turn["position_ids"] = torch.cat([text.clamp(min=0)[None], vision])
    return turn
