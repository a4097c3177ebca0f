"""PLPHP: per-layer, per-head pruning of the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import register
from .base import CacheMethod
from .budgets import check_range, floor_budget
from .tokens import ImageGroups, LayerTokens


def vision_attention_score(attention: Tensor, groups: ImageGroups) -> Tensor:
    """Attention on all image tokens of a sample, mean over heads, in [0, 1]; the same for each of its images.

    attention: (groups, kv_heads, n) of the prompt, mean over its ranking rows, -inf at padding. Returns (groups,).
    """
    per_image = attention.clamp(min=0).sum(-1).mean(1)
    same_sample = groups.row.unsqueeze(1) == groups.row
    return (same_sample * per_image).sum(-1)


def layer_classes(mass: Tensor, alpha: float | None, beta: float | None) -> Tensor:
    """+1 for vision-attentive layers, -1 for vision-indifferent ones, 0 for balanced ones.

    mass: (layers, groups) vision attention score of each layer. `alpha` and `beta` are its thresholds: attentive
    from `alpha` on, indifferent below `beta`. Where both are None each sample's layers are ranked, and the top
    and the bottom third (ties: the earlier layer counts as higher) are attentive and indifferent.
    """
    if alpha is not None and beta is not None:
        return (mass >= alpha).long() - ((mass < beta) & (mass < alpha)).long()
    third = mass.shape[0] // 3
    order = mass.argsort(dim=0, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        0, order, torch.arange(mass.shape[0], device=mass.device).unsqueeze(1).expand_as(order)
    )
    return (rank < third).long() - (rank >= mass.shape[0] - third).long()


def retention_rates(classes: Tensor, share: Tensor, delta: float) -> Tensor:
    """`share + delta * class`, with `delta` reduced per image so that every rate stays in (0, 1].

    classes: (layers, groups); share: (groups,). A symmetric reduction keeps the mean over as many attentive as
    indifferent layers at `share`. Returns (layers, groups).
    """
    room = torch.minimum(1 - share, share / 2)
    return share + classes * room.clamp(max=delta)


@register("plphp")
@dataclass
class PLPHP(CacheMethod):
    """Evict image tokens from the KV cache, more in layers that look away, and different ones in every head.

    Layer level: the vision attention score of a layer is the attention of the prompt's ranking rows on all image
    tokens, mean over rows and heads, in [0, 1]. Attentive layers keep `keep + delta` of each image, indifferent ones
    `keep - delta`, balanced ones `keep`. Head level: each KV head keeps the top tokens of every image by the same
    rows' attention (mean over the query heads that share the KV head). Text always stays; hidden states are never
    shortened, so prefill costs what it did and decoding gets cheaper.

    keep: mean fraction of each image's tokens (r in the paper), or tokens per image; 0.4 is this library's
        default, milder than the 0.33 to 0.10 of independent comparisons.
    delta: how far attentive and indifferent layers move from `keep` (reduced where a rate would leave (0, 1] or
        fall below half of `keep`, so that the mean stays at `keep`). The published value is unknown; 0, this library's
        default, keeps all layers level, which answered best on glimpse (`benchmarks/defaults.py`).
    alpha, beta: thresholds of the vision attention score. The published values are unknown and models differ
        in their level, so the default is None for both: the thresholds are then the tercile boundaries of the
        scores in the sample at hand, as many layers gain `delta` as lose it, and the mean retention is `keep` on any
        model. This calibration needs all layers' scores, so that with a `delta` eviction happens when the prefill
        ends. With explicit values (0 <= beta <= alpha <= 1) the mean follows the model, and each layer evicts as soon
        as its own attention is done, as it does without a `delta`.
    start_layer: layers before it keep everything; 0 is this library's default, so that the mean is `keep`.
    rows: how many text tokens at the prompt's end rank; None, this library's default, for all from the first image on.
        Which rows the paper ranks by is not known. One row knows what the first word of the answer needs, and that
        word is decided before anything is evicted.

    Source: PLPHP, arXiv 2502.14504 (levels from the abstract, the three-class rule from secondary descriptions;
    the score's definition and the ranking rows are this library's, since no code is public).
    """

    summary = "per-head top tokens stay in the KV cache after prefill, with `delta` more of them in attentive layers"
    source = "PLPHP, arXiv 2502.14504"

    keep: float | int = 0.4
    delta: float = 0.0
    alpha: float | None = None
    beta: float | None = None
    start_layer: int = 0
    rows: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("delta", self.delta, 0, 1)
        check_range("start_layer", self.start_layer, 0, integer=True)
        if self.rows is not None:
            check_range("rows", self.rows, 1, integer=True)
        if (self.alpha is None) != (self.beta is None):
            raise ValueError("give both alpha and beta, or neither (thresholds from the scores' own terciles)")
        if self.alpha is not None and self.beta is not None:
            check_range("alpha", self.alpha, 0, 1)
            check_range("beta", self.beta, 0, 1)
            if self.beta > self.alpha:
                raise ValueError(f"beta must not exceed alpha, got beta={self.beta} and alpha={self.alpha}")

    @property
    def needs_all_layers(self) -> bool:
        """Terciles compare layers; explicit thresholds do not, nor do level layers."""
        return self.alpha is None and self.delta > 0

    def first_layer(self) -> int:
        return self.start_layer

    def score(self, tokens: LayerTokens) -> Tensor:
        return tokens.per_kv_head(tokens.of_images(tokens.mean_attention(tokens.last_text(self.rows))))

    def statistics(self, scores: Tensor, groups: ImageGroups) -> Tensor:
        return vision_attention_score(scores, groups).unsqueeze(0)

    def budgets(self, statistics: Tensor, groups: ImageGroups) -> Tensor:
        classes = layer_classes(statistics[:, 0], self.alpha, self.beta)
        return floor_budget(retention_rates(classes, self.share(groups), self.delta), groups)
