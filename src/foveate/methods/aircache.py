"""AirCache: a few elite text tokens judge the image entries, and layers share the budget by how they judge."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import register
from .base import CacheMethod
from .budgets import check_range, floor_budget
from .tokens import ImageGroups, LayerTokens


def elite_rows(tokens: LayerTokens, alpha: float, rows: int | None = None) -> Tensor:
    """The text rows that the last one attends to, over text alone, with at least `alpha` of the largest weight.

    The attention is averaged over heads. rows: how many text rows at the end there are to choose from, None for all.
    Returns (batch, t): `tokens.text`, -1 where a row is not elite.
    """
    tokens = replace(tokens, text=tokens.last_text(rows))
    text_only = replace(tokens, visible=tokens.keys_of(tokens.text))
    weights = text_only.attention(tokens.last.unsqueeze(1))[:, :, 0].mean(1)
    weights = weights.gather(1, tokens.text.clamp(min=0) + tokens.past).masked_fill(tokens.text < 0, -torch.inf)
    return torch.where(weights >= alpha * weights.amax(1, keepdim=True), tokens.text, -1)


def strength_and_skewness(importance: Tensor, groups: ImageGroups) -> Tensor:
    """Sum and skewness of the importance of all image tokens of a sample, the same for each of its images.

    importance: (groups, n), -inf at padding. Returns (2, groups). The skewness is that of the population, 0 where
    nothing varies; the sample's correction is the same in every layer and would cancel.
    """
    present = importance.isfinite()
    same_sample = (groups.row.unsqueeze(1) == groups.row).double()
    values = importance.masked_fill(~present, 0).double()
    count = same_sample @ present.sum(-1).double()
    strength = same_sample @ values.sum(-1)
    centred = (values - (strength / count.clamp(min=1)).unsqueeze(-1)) * present
    second, third = ((same_sample @ (centred**p).sum(-1)) / count.clamp(min=1) for p in (2, 3))
    # Rounding leaves a variance of about 1e-16 of the mean squared where all values are equal.
    varies = second > 1e-12 * (strength / count.clamp(min=1)) ** 2
    return torch.stack([strength, torch.where(varies, third / second.clamp(min=1e-300) ** 1.5, 0)])


def layer_shares(statistics: Tensor, share: Tensor) -> Tensor:
    """`share * (strength' + skewness') / 2`, each statistic divided by its mean over layers, negative ones as 0.

    Where a share exceeds 1, it becomes 1 and those of the other layers grow by one common factor until the mean is
    `share` again. statistics: (layers, 2, groups); share: (groups,). Returns (layers, groups).
    """
    positive = statistics.double().clamp(min=0)
    mean = positive.mean(0)
    weight = torch.where(mean > 0, positive / mean.clamp(min=1e-300), 1).mean(1)
    # With the `full` heaviest layers at 1, the others are multiplied by `factor`; the first that fits is right.
    ordered = weight.sort(dim=0, descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)
    full = torch.arange(len(weight), device=weight.device).unsqueeze(1)
    factor = (share * len(weight) - full) / rest.clamp(min=1e-30)
    first = (factor * ordered <= 1 + 1e-9).int().argmax(0, keepdim=True)
    return (factor.gather(0, first) * weight).clamp(max=1)


@register("aircache")
@dataclass
class AirCache(CacheMethod):
    """Evict what the text tokens that matter ignore, less in layers that look at the image, and look sharply.

    Elite text tokens are those of the prompt to which its last token pays at least `alpha` of the largest attention
    (over text alone, mean over heads). Their attention over the image and the elite keys, mean over these rows, is
    the importance; each KV head keeps the top tokens of every image. A layer's share is `keep` times the mean of its
    strength (sum of the importance over the image) and of its skewness, each relative to the mean over layers, so
    that the mean share is `keep`; a share above 1 becomes 1 and the excess goes to the other layers in proportion.
    Budgets compare layers: eviction happens when the prefill ends. Text always stays.

    keep: mean fraction of each image's tokens, or tokens per image; 0.1 is the setting of the paper's abstract.
    alpha: threshold of the elite, in [0, 1]. 0.9 is the reported value; with 0, this library's default, every text
        token judges. One or two elite rows know what the first word of the answer needs, and that word is decided
        before anything is evicted; the reported order, elite before all, was measured at 1 % on prompts of dozens of
        tokens.
    rows: how many text tokens at the prompt's end may judge; None, the default, for all from the first image on.

    Source: AirCache, arXiv 2503.23956 (the two ideas from the abstract; formulas and `alpha` from a secondary
    description, since no code is public; how statistics are normalised over layers is this library's choice).
    """

    summary = "text tokens, or an elite of them, rank entries per head; strength and skewness share out the budget"
    source = "AirCache, arXiv 2503.23956"

    keep: float | int = 0.1
    alpha: float = 0.0
    rows: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is not None:
            check_range("rows", self.rows, 1, integer=True)
        check_range("alpha", self.alpha, 0, 1)

    @property
    def needs_all_layers(self) -> bool:
        """Shares are relative to the mean over layers."""
        return True

    def score(self, tokens: LayerTokens) -> Tensor:
        rows = elite_rows(tokens, self.alpha, self.rows)
        judged = replace(tokens, visible=tokens.image_mask() | tokens.keys_of(rows))
        return tokens.per_kv_head(tokens.of_images(judged.mean_attention(rows)))

    def statistics(self, scores: Tensor, groups: ImageGroups) -> Tensor:
        return strength_and_skewness(scores.mean(1), groups)

    def budgets(self, statistics: Tensor, groups: ImageGroups) -> Tensor:
        return floor_budget(layer_shares(statistics, self.share(groups)), groups)
