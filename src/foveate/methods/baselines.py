"""Baselines every method has to beat: tokens chosen blindly, at each of the places where methods act."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import register
from .base import CacheMethod, CrossMethod, EncoderMethod, LayerMethod, Method
from .budgets import check_range, floor_budget, topk_mask
from .tokens import EncoderTokens, LayerTokens


def evenly(present: Tensor, budget: Tensor) -> Tensor:
    """`budget` of the present tokens of each group at an even stride, the first at half a stride.

    present: bool (groups, n). budget: (groups,). Returns bool (groups, n).
    """
    count, share = present.sum(-1, keepdim=True), budget.unsqueeze(-1)
    # In units of 1/budget token the strides end at multiples of count; half a stride of offset centres the choice.
    ends, whole = present.long().cumsum(-1) * share + count // 2, count.clamp(min=1)
    return present & (ends // whole > (ends - share) // whole)


def strided(budget: Tensor, n: int) -> Tensor:
    """`evenly` where all `n` tokens are present. budget: (tiles,); bool (tiles, n)."""
    return evenly(torch.ones(len(budget), n, dtype=torch.bool, device=budget.device), budget)


def seeded(seed: int, *shape: int) -> Tensor:
    """Uniform float32 numbers of this shape that depend on the seed alone: drawn on the CPU, whatever the defaults."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float32, device="cpu")


def drawn(present: Tensor, seed: int, heads: int = 1) -> Tensor:
    """Random scores (groups, heads, n), -inf where nothing is present.

    present: bool (groups, n). A group's scores depend on the seed and on how many are present in it alone.
    """
    scores = torch.full((present.shape[0], heads, present.shape[1]), -torch.inf, dtype=torch.float32, device="cpu")
    for own, there in zip(scores, present.cpu(), strict=True):
        own[:, there] = seeded(seed, heads, int(there.sum()))
    return scores.to(present.device)


@dataclass
class Seeded(Method):
    """What the random baselines share. seed: of the draw."""

    keep: float | int = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("seed", self.seed, 0, 2**63 - 1, integer=True)


@register("random")
@dataclass
class Random(Seeded, EncoderMethod):
    """Keep tokens drawn uniformly at random; the baseline that many published methods do not beat.

    The draw depends on `seed` and the tile's size alone, so that a picture keeps the same tokens in any batch.

    keep: fraction of each image's tokens, or tokens per image; 0.25 is this library's default.
    seed: of the draw.

    Source: a baseline; its strength is documented in arXiv 2502.11501 and 2511.02650.
    """

    summary = "baseline: tokens drawn at random (seeded), before the LLM"
    source = "baseline (arXiv 2502.11501)"

    def score(self, tokens: EncoderTokens) -> Tensor:
        scores = seeded(self.seed, tokens.grid[0] * tokens.grid[1])
        return scores.to(tokens.device).expand(tokens.tiles, -1)

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        return topk_mask(self.score(tokens), budget)


@register("random_layer")
@dataclass
class RandomLayer(Seeded, LayerMethod):
    """Keep image tokens drawn uniformly at random from layer `layer` on; the baseline for methods inside the LLM.

    The layers before it let the text read the whole picture, which alone makes it better than a draw before the LLM.

    keep: fraction of each image's tokens, or tokens per image; 0.25 is this library's default.
    seed: of the draw, which depends on it and on the image's size alone.
    layer: the first layer without the dropped tokens; 2 is FastV's default.

    Source: a baseline of this library.
    """

    summary = "baseline: tokens drawn at random (seeded), inside the LLM"
    source = "baseline"

    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("layer", self.layer, 1, integer=True)

    def stages(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def score(self, tokens: LayerTokens) -> Tensor:
        return drawn(tokens.groups.present, self.seed)[:, 0]

    def select(self, tokens: LayerTokens) -> Tensor:
        return topk_mask(self.score(tokens), floor_budget(self.share(tokens.groups), tokens.groups))


@register("random_cache")
@dataclass
class RandomCache(Seeded, CacheMethod):
    """Evict image tokens drawn uniformly at random, in each layer and KV head others; the baseline for the KV cache.

    The prompt has read the whole picture before anything is evicted, and what one layer or head loses another keeps:
    far better than a draw before the LLM, above all where answers are short.

    keep: fraction of each image's tokens, or tokens per image; 0.25 is this library's default.
    seed: of the draw, which depends on it, the layer, the number of KV heads and the image's size alone.

    Source: a baseline of this library.
    """

    summary = "baseline: entries drawn at random (seeded) in each layer and head, evicted after the prefill"
    source = "baseline"

    def score(self, tokens: LayerTokens) -> Tensor:
        return drawn(tokens.groups.present, (self.seed * 1009 + tokens.layer) % 2**63, tokens.key.shape[1])


@register("random_cross")
@dataclass
class RandomCross(Seeded, CrossMethod):
    """Keep image features drawn uniformly at random after the first cross-attention layer; the baseline for the others.

    keep: fraction of the sample's valid features, or features per image; 0.25 is this library's default.
    seed: of the draw, which depends on it and on the number of valid features alone.

    Source: a baseline of this library.
    """

    summary = "baseline: image features drawn at random (seeded) after the first cross-attention layer"
    source = "baseline"

    def score(self, attention: Tensor, valid: Tensor) -> Tensor:
        return drawn(valid, self.seed)[:, 0]

    def select(self, attention: Tensor, valid: Tensor, images: Tensor) -> Tensor:
        return topk_mask(self.score(attention, valid), self.budget(valid, images))


@register("uniform")
@dataclass
class Uniform(EncoderMethod):
    """Keep every n-th token in raster order: an even stride over the picture.

    keep: fraction of each image's tokens, or tokens per image; 0.25 is this library's default.

    Source: a baseline; its strength is documented in FEATHER, arXiv 2412.13180.
    """

    summary = "baseline: every n-th token, before the LLM"
    source = "baseline (arXiv 2412.13180)"

    keep: float | int = 0.25

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        return strided(budget, tokens.grid[0] * tokens.grid[1])
