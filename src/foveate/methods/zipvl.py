"""ZipVL: each layer attends among as many image tokens as its attention needs, and keeps no others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import register
from .base import CacheMethod
from .budgets import check_range, floor_budget, topk_mask
from .tokens import ImageGroups, LayerTokens


def probes_that_see(tokens: LayerTokens, rows: Tensor) -> Tensor:
    """How many of the rows may look at each key: (batch, keys). rows: (batch, r), -1 counts nothing."""
    if tokens.sees is not None:
        sees = tokens.sees[:, 0].expand(len(rows), -1, -1)
        at = rows.clamp(min=0).unsqueeze(-1).expand(-1, -1, sees.shape[-1])
        return (sees.gather(1, at) & (rows >= 0).unsqueeze(-1)).sum(1)
    at = torch.where(rows < 0, -1, rows + tokens.past).unsqueeze(-1)
    return (torch.arange(tokens.key.shape[2], device=rows.device) <= at).sum(1)


def tokens_for_mass(mass: Tensor, threshold: float) -> Tensor:
    """The smallest number of tokens whose mass reaches `threshold` of the whole, at least 1.

    mass: (groups, n), -inf at padding. Returns int64 (groups,).
    """
    reached = mass.double().clamp(min=0).sort(dim=-1, descending=True).values.cumsum(-1)
    return (reached < threshold * reached[:, -1:]).sum(-1) + 1


@register("zipvl")
@dataclass
class ZipVL(CacheMethod):
    """Let a layer attend among text and the image tokens that matter to it; the others fall silent there.

    In front of each layer the last rows of the prompt are probes: the attention a token receives from them, summed
    over probes and heads, says how many tokens the layer needs; divided by how many probes may see the token, it
    ranks them. The chosen ones are the same for all heads; a token that is not chosen is neither query nor key: its
    attention output is zero, its hidden state goes on to the next layer, which chooses anew, and its keys and
    values are not kept. Text always takes part.

    keep: the most that may stay of each image, as a fraction or as tokens; 0.99, this library's default, leaves the
        choice to `threshold`. 1.0 leaves the model untouched whatever the threshold.
    threshold: the share of an image's received attention that its chosen tokens must reach, in [0, 1]; 0.975 is the
        larger of the two reported values (0.96 is the other).
    probes: rows at the prompt's end that are read; 64 is this library's default, since the published mix of recent
        and random probes would make the choice depend on a seed.

    Source: ZipVL, arXiv 2410.08584 (idea and place from the abstract, second version; formulas, thresholds and
    probes from secondary descriptions, since no code was found). The paper counts text among the tokens.
    """

    summary = "sparse prefill attention among the image tokens that hold most of a layer's attention"
    source = "ZipVL, arXiv 2410.08584"
    sparse_attention = True

    keep: float | int = 0.99
    threshold: float = 0.975
    probes: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("threshold", self.threshold, 0, 1)
        check_range("probes", self.probes, 1, integer=True)

    def score(self, tokens: LayerTokens) -> Tensor:
        """(groups, 1, 2, n): the attention received in all, and per probe that may see the token."""
        rows = tokens.recent(self.probes)
        mass = tokens.received(rows).mean(1, keepdim=True)
        per_probe = mass / probes_that_see(tokens, rows).clamp(min=1).unsqueeze(1)
        return tokens.of_images(torch.stack([mass, per_probe], dim=2))

    def statistics(self, scores: Tensor, groups: ImageGroups) -> Tensor:
        return tokens_for_mass(scores[:, 0, 0], self.threshold).unsqueeze(0)

    def budgets(self, statistics: Tensor, groups: ImageGroups) -> Tensor:
        return torch.minimum(statistics[:, 0], floor_budget(self.share(groups), groups))

    def select(self, scores: Tensor, budget: Tensor) -> Tensor:
        return topk_mask(scores[:, :, 1], budget.unsqueeze(-1))
