"""MixKV: entries of the KV cache stay for what the prompt looks at, for what they hold, and for being unlike others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import register
from .budgets import check_choice
from .tokens import LayerTokens
from .visual_snapkv import VisualSnapKV


def stretched(values: Tensor, present: Tensor, like: Tensor) -> Tensor:
    """Values stretched to [0, 1] over the present tokens, and then to the mean of `like`; 0 where all are equal.

    values, like: (groups, heads, n), of meaning where `present`, bool (groups, 1, n). Returns the same shape.
    """
    low = values.masked_fill(~present, torch.inf).amin(-1, keepdim=True)
    high = values.masked_fill(~present, -torch.inf).amax(-1, keepdim=True)
    # Rounding of equal values is no difference.
    equal = high - low <= 1e-6 * torch.maximum(low.abs(), high.abs())
    unit = ((values - low) / (high - low).clamp(min=1e-12)).masked_fill(~present | equal, 0)
    mean, wanted = (x.masked_fill(~present, 0).sum(-1, keepdim=True) for x in (unit, like))
    return unit * wanted / mean.clamp(min=1e-12)


def unlikeness(keys: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """How little each key is like the mean direction of all, and how much the keys of a head are alike.

    keys: (groups, heads, n, d); present: bool (groups, 1, n). Returns float32 (groups, heads, n), the negative cosine
    with the mean of the normalised keys; and (groups, heads), the mean cosine of all pairs of two tokens, 1 for one.
    """
    directions = normalize(keys.float(), dim=-1) * present.unsqueeze(-1)
    count = present.sum(-1)
    mean = directions.sum(2) / count.unsqueeze(-1).clamp(min=1)
    away = -(directions @ normalize(mean, dim=-1).unsqueeze(-1)).squeeze(-1)
    pairs = (count * mean.square().sum(-1) - 1) / (count - 1).clamp(min=1)
    return away, torch.where(count > 1, pairs, 1.0)


@register("mixkv")
@dataclass
class MixKV(VisualSnapKV):
    """Visual SnapKV whose score also counts how unlike the others an entry's key is, and how long its value.

    Diversity is the negative cosine of a key with the mean direction of the keys of its image in that head, and
    importance has a second part, the norm of the value. Both are stretched to [0, 1] over the image and then to the
    mean of the attention. Each KV head keeps the top tokens of every image; text always stays.

    keep: fraction of each image's tokens, or tokens per image; 0.4 is this library's default, that of visual_snapkv.
    window: rows at the prompt's end whose attention is read; 32 as in the authors' scripts.
    kernel: width of the pooling of the attention along an image's tokens, odd; 5 is the default of the authors' code.
    mix: "headwise" weighs diversity by how alike the keys of the head are (s), and attention and value norm by 1 - s;
        "equal" takes a third of each.

    Raises:
        ValueError: also for an even `kernel`.

    Source: MixKV, arXiv 2510.20707, and the authors' code. There s is a mean over samples from a file, for one model;
    here it is that of the picture at hand, which the code works out, too, but does not use. There all entries in front
    of the window compete, here image tokens alone.
    """

    summary = "visual_snapkv's attention mixed with value norms and with how unlike others the keys are, per head"
    source = "MixKV, arXiv 2510.20707"

    mix: Literal["headwise", "equal"] = "headwise"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mix", self.mix, ("headwise", "equal"))

    def score(self, tokens: LayerTokens) -> Tensor:
        attention, present = super().score(tokens), tokens.groups.present.unsqueeze(1)
        away, alike = unlikeness(tokens.image_keys(), present)
        diverse = stretched(away, present, attention)
        heavy = stretched(tokens.image_values().float().norm(dim=-1), present, attention)
        if self.mix == "equal":
            return (attention + diverse + heavy) / 3
        share = alike.clamp(0, 1).unsqueeze(-1)
        mixed = share * diverse + (1 - share) * (attention + heavy)
        return mixed.masked_fill(~present, -torch.inf)  # also where the share leaves nothing of the attention
