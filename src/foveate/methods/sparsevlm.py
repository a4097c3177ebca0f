"""SparseVLM: the text tokens that have to do with the image rate its tokens, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import register
from .budgets import check_range, topk_mask
from .clustering import cluster_means, density_peaks
from .staged import StagedMethod
from .tokens import LayerTokens


def text_relevance(
    images: Tensor, present: Tensor, row: Tensor, text: Tensor, real: Tensor, chunk_elements: int = 1 << 24
) -> Tensor:
    """How much the image tokens of a sample point at each of its text tokens.

    The mean over the sample's image tokens v of the softmax over its text tokens t of <v, t>, in chunks of v.

    images: (groups, n, d). present: bool (groups, n). row: (groups,) sample of each image. text: (batch, t, d).
    real: bool (batch, t), at least one a sample. Returns float32 (batch, t), 0 where not `real`.
    """
    words = text.float()[row].transpose(1, 2)
    step = max(1, chunk_elements // (len(row) * max(words.shape[1:])))
    total = torch.zeros(len(row), text.shape[1], dtype=torch.float32, device=text.device)
    for start in range(0, images.shape[1], step):
        part = slice(start, start + step)
        logits = (images[:, part].float() @ words).masked_fill(~real[row].unsqueeze(1), -torch.inf)
        total += (logits.softmax(-1) * present[:, part].unsqueeze(-1)).sum(1)
    # A product, not index_add: atomics would add in any order.
    of_sample = (row == torch.arange(len(text), device=row.device).unsqueeze(-1)).float()
    return (of_sample @ total) / (of_sample @ present.sum(-1, keepdim=True).float()).clamp(min=1)


def raters(relevance: Tensor, real: Tensor) -> Tensor:
    """Text tokens of more than average relevance. relevance, real: (batch, t); returns bool (batch, t)."""
    mean = (relevance * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
    return (relevance > mean) & real


def recycled(
    scores: Tensor, states: Tensor, budget: Tensor, count: Tensor, recycle: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spend a part of the budget on means of dropped tokens.

    Of the `count - budget` tokens that would go, as many as floor(recycle * that) + 1, the best of those that the
    scores alone do not keep, form a tenth as many clusters (rounded down, plus 1; fewer than `budget`).

    scores: (groups, n), -inf at padding. states: (groups, n, hidden). budget, count: (groups,).
    Returns kept, bool (groups, n), kept by score; centers (groups, most) and real, bool (groups, most), the token in
    the middle of each cluster; and means, float32 (groups, most, hidden).
    """
    gone, n = count - budget, scores.shape[1]
    # The groups' own sizes live on the device; these bounds do not.
    widest = min(n, int(recycle * n) + 1)
    most = widest // 10 + 1
    size = (recycle * gone.double() + 1e-6).floor().long() + 1
    clusters = torch.minimum(size // 10 + 1, budget - 1) * (gone > 0)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    first = (budget - clusters).unsqueeze(-1)
    pool = order.gather(1, (first + torch.arange(widest, device=scores.device)).clamp(max=n - 1))
    valid = torch.arange(widest, device=scores.device) < (size * (clusters > 0)).unsqueeze(-1)
    points = states.gather(1, pool.unsqueeze(-1).expand(-1, -1, states.shape[-1])).float()
    # What all share costs the products their digits.
    apart = points - points.mean(1, keepdim=True)
    distance = torch.cdist(apart, apart, compute_mode="use_mm_for_euclid_dist") / apart.shape[-1] ** 0.5
    # Two tokens that are each other's nearest tie, and must in spite of rounding.
    distance = torch.maximum(distance, distance.transpose(1, 2))
    distance.diagonal(dim1=1, dim2=2).zero_()
    centers, real, member = density_peaks(distance, valid, clusters, most)
    kept = topk_mask(scores, first.squeeze(-1))
    return kept, pool.gather(1, centers), real, cluster_means(points, member, valid, most)


@register("sparsevlm")
@dataclass
class SparseVLM(StagedMethod):
    """At each stage keep the image tokens that the relevant text tokens (the raters) attend to.

    Raters are the text tokens, from the sample's first image on, whose relevance is above the sample's mean: the mean
    over its image tokens of a softmax over its text tokens of the products of their embeddings in front of the first
    layer. The score is the raters' attention in the layer in front of the stage, averaged over heads and raters; an
    image that no rater stands behind is rated by the last prompt token. Survivors keep their order and position ids.
    Where a sample has several images, each keeps its own share, and the raters are the sample's.

    keep: fraction of each image's tokens, or tokens per image, left after the last stage; 0.19 is this library's
        default, where the published list for 192 tokens on average ends (110 of 576).
    layers: the first layer without the dropped tokens of each stage; None is the paper's default, the attention of
        layers 2, 6 and 15 of 32 (counted from 0; so 3, 7 and 16 here), at the same relative depth.
    earlier: what the stages before the last leave, each of the same kind as `keep`, descending; None for a geometric
        schedule. The published lists for 576 tokens are keep=110, earlier=(300, 200); 36, (303, 110); 17, (66, 30).
    recycle: share of the dropped tokens that is merged into a tenth as many means, in [0, 1]; 0.3 is the paper's
        default, 0 (drop them) this library's, which leaves hidden states alone. A mean takes the place of its
        cluster's centre and is paid from the budget.

    Source: SparseVLM, arXiv 2410.04417, and the authors' code. There raters are found once, before the first stage,
    means are appended beyond the budget, and position ids are made compact.
    """

    summary = "attention of the text tokens that match the image drops tokens in stages, and can merge them"
    source = "SparseVLM, arXiv 2410.04417"
    published = (3, 7, 16)
    uses_embeddings = True

    keep: float | int = 0.19
    recycle: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("recycle", self.recycle, 0, 1)

    @property
    def only_drops(self) -> bool:
        return not self.recycle

    def score(self, tokens: LayerTokens) -> Tensor:
        """(groups, n) what the raters pay to each image token, -inf at padding."""
        assert tokens.embedded is not None
        groups, real = tokens.groups, tokens.text >= 0
        images, text = tokens.image_rows(tokens.embedded), tokens.text_rows(tokens.embedded)
        chosen = raters(text_relevance(images, groups.present, groups.row, text, real), real)
        # The sum over raters ranks like their mean.
        scores = tokens.of_images(tokens.received(torch.where(chosen, tokens.text, -1)).mean(1))
        unrated = scores.clamp(min=0).sum(-1, keepdim=True) == 0
        return torch.where(unrated, tokens.last_attention().mean(1), scores)

    def _recycled(self, tokens: LayerTokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert tokens.left is not None
        states = tokens.image_rows(tokens.left)
        return recycled(self.score(tokens), states, self.stage_budget(tokens), tokens.groups.count, self.recycle)

    def select(self, tokens: LayerTokens) -> Tensor:
        if not self.recycle:
            return topk_mask(self.score(tokens), self.stage_budget(tokens))
        kept, centers, real, _ = self._recycled(tokens)
        # Clusters that do not exist point one past the end.
        at = torch.where(real, centers, kept.shape[1])
        return torch.nn.functional.pad(kept, (0, 1)).scatter(1, at, True)[:, :-1]

    def merge(self, tokens: LayerTokens, keep: Tensor) -> Tensor | None:
        if not self.recycle:
            return None
        _, centers, real, means = self._recycled(tokens)
        assert tokens.left is not None
        states = tokens.image_rows(tokens.left)
        at = torch.where(real, centers, keep.shape[1]).unsqueeze(-1).expand(-1, -1, states.shape[-1])
        room = torch.nn.functional.pad(states, (0, 0, 0, 1))
        return room.scatter(1, at, means.to(states.dtype))[:, :-1]
