"""Tiny random models of every family, and inputs for them, made from configurations alone.

No hub, no processor files: pixels are noise, text is random ids, and the number of placeholders comes from
the processor code of transformers itself. Every input dict goes straight into `model.generate(**inputs)`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from . import known
from .base import PAD, Tiny


def of(model: PreTrainedModel) -> Tiny:
    """The family of a tiny model."""
    return next(family for family in known().values() if family.model_type == model.config.model_type)


def config(family: str) -> PreTrainedConfig:
    """A family's tiny configuration."""
    return known()[family].config()


@torch.no_grad()
def randomize(model: nn.Module, seed: int, peak: float) -> None:
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
    model = known()[family].make(config(family)).eval().requires_grad_(False)
    randomize(model, seed, peak)
    # No end token: all steps run.
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=None, bos_token_id=1)
    return model


def build(family: str, attn: str = "sdpa", seed: int = 0, peak: float = 1.5) -> PreTrainedModel:
    """Return a fresh fp32 model; equal arguments (whatever `attn`) give equal weights."""
    model = copy.deepcopy(_template(family, seed, peak))
    model.set_attn_implementation(attn)
    return model


def inputs(
    family: str,
    images: Sequence[int] = (1,),
    text: Sequence[int] = (6,),
    seed: int = 0,
    between: int = 2,
    alike: bool = False,
) -> dict[str, Tensor]:
    """Return a left-padded batch: row b has `images[b]` images and ends with `text[b]` words.

    Every image is followed by `between` words. Successive images differ in kind, from kind `seed % 4` on, unless they
    are `alike`.
    """
    return known()[family].inputs(images, text, seed, between, alike)


def videos(
    family: str,
    videos: Sequence[int] = (1,),
    text: Sequence[int] = (6,),
    images: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The same with films: row b has `videos[b]` of them, then `images[b]` images. Films differ in length and size."""
    return known()[family].videos(videos, text, images, seed)


def video_counts(
    family: str, videos: Sequence[int], images: Sequence[int] | None = None, seed: int = 0
) -> list[list[list[int]]]:
    """For each row the films and then the images, for each of these how many tokens each frame has."""
    film, image, tiny = count(seed), count(), known()[family]
    return [
        [
            *(tiny.clip(next(film) % 4) for _ in range(n)),
            *([tiny.features(next(image) % 4)] for _ in range(images[row] if images else 0)),
        ]
        for row, n in enumerate(videos)
    ]


BATCHES: dict[str, dict[str, Any]] = {
    "one": dict(images=(1,), text=(6,)),
    "ragged": dict(images=(1, 2, 1), text=(4, 9, 2)),  # left-padded
}


def image_counts(family: str, images: Iterable[int], seed: int = 0) -> list[list[int]]:
    """Return how many tokens each image of `inputs(family, images, seed=seed)` has."""
    kind = count(seed)
    return [[known()[family].features(next(kind) % 4) for _ in range(n)] for n in images]


def next_turn(
    model: PreTrainedModel, batch: dict[str, Tensor], sequences: Tensor, image: bool = False, seed: int = 50
) -> dict[str, Tensor]:
    """Return what `generate` needs, beside the cache, to go on after `sequences` with words or an image."""
    family = of(model)
    rows, length = len(sequences), sequences.shape[1]
    new = family.inputs((1,) * rows if image else (0,) * rows, (4,) * rows, seed)
    ids = torch.cat([sequences, new["input_ids"]], 1)
    mask = torch.cat([batch["attention_mask"], new["attention_mask"].new_ones(rows, ids.shape[1])], 1)
    turn = new | {"input_ids": ids, "attention_mask": mask[:, : ids.shape[1]]}
    return family.go_on(model, batch, turn, length, image)
