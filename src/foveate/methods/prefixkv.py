"""PrefixKV: every layer keeps as many image entries as reach one share of its attention, the same for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import register
from .base import CacheMethod
from .budgets import check_range, floor_budget, share_out, topk_mask
from .tokens import ImageGroups, LayerTokens

if TYPE_CHECKING:
    from .host import Host


def share_before(importance: Tensor) -> Tensor:
    """The share of the importance that lies before each place, from the most important token on.

    importance: (groups, n), -inf at padding. Returns float64 (groups, n): 0 at the first place, infinite behind the
    last token.
    """
    ordered = importance.double().sort(dim=-1, descending=True).values
    mass = ordered.clamp(min=0)
    before = (mass.cumsum(-1) - mass) / mass.sum(-1, keepdim=True).clamp(min=1e-300)
    return before.masked_fill(ordered == -torch.inf, torch.inf)


def prefix_budgets(before: Tensor, total: Tensor) -> Tensor:
    """How many tokens each layer keeps where one share of the importance must be reached in all, and `total` stay.

    A layer needs its o-th token for the share p if those before it do not reach p; so with the largest p that fits stay
    the `total` tokens of all layers before which least lies. before: (layers, groups, n), as `share_before` returns it,
    total: (groups,). Returns int64 (layers, groups).
    """
    layers, groups, n = before.shape
    every = before.transpose(0, 1).reshape(groups, layers * n)
    return topk_mask(-every, total).view(groups, layers, n).sum(-1).T


@register("prefixkv")
@dataclass
class PrefixKV(CacheMethod):
    """Evict image entries so that every layer keeps the same share of its attention, and all together `keep`.

    A token's importance is the attention it receives, mean over heads and summed over the rows of the prompt; all heads
    of a layer keep the same tokens. Layers whose attention lies on few tokens keep few. Budgets compare layers:
    eviction happens when the prefill ends. Text always stays.

    keep: mean fraction of each image's tokens, or tokens per image; 0.2 is a budget at which results are reported.
    rows: how many rows of the prompt are read, at an even stride; None, the default, for all. Reading all costs as much
        as attention itself.
    profile: relative shares of all layers, found before, instead of those of the picture at hand; their mean becomes
        `keep`. The authors' code ships such profiles, each a mean over ten samples.

    Source: PrefixKV, arXiv 2412.03409 (the rule from a secondary description, the kind of profiles from the authors'
    files). There the share is found by bisection and text competes, too; here it is exact, and each image has its
    own. The published form also evicts while decoding; this one does not.
    """

    summary = "one share of attention for all layers says how many entries each keeps"
    source = "PrefixKV, arXiv 2412.03409"

    keep: float | int = 0.2
    rows: int | None = None
    profile: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is not None:
            check_range("rows (if not None)", self.rows, 1, integer=True)
        if self.profile is not None:
            if not isinstance(self.profile, (tuple, list)) or not self.profile:
                raise ValueError(f"profile must be a tuple of numbers, one a layer, or None, got {self.profile!r}")
            self.profile = tuple(self.profile)  # JSON knows no tuples
            for share in self.profile:
                check_range("profile", share, 1e-6)

    def for_host(self, host: Host) -> PrefixKV:
        if self.profile is not None and len(self.profile) != host.depth:
            raise ValueError(f"profile has {len(self.profile)} shares, and the model has {host.depth} layers")
        return self

    @property
    def needs_all_layers(self) -> bool:
        """One share is found for all layers."""
        return True

    def score(self, tokens: LayerTokens) -> Tensor:
        """(groups, 1, n)."""
        return tokens.of_images(tokens.received_from_all(self.rows).mean(1, keepdim=True))

    def statistics(self, scores: Tensor, groups: ImageGroups) -> Tensor:
        return share_before(scores[:, 0]).T

    def budgets(self, statistics: Tensor, groups: ImageGroups) -> Tensor:
        layers, each = len(statistics), floor_budget(self.share(groups), groups)
        if self.profile is None:
            return prefix_budgets(statistics.transpose(1, 2), layers * each)
        if layers != len(self.profile):
            raise ValueError(
                f"profile has {len(self.profile)} shares, and the caches of {layers} layers are read (a window forgets "
                "by itself): use profile=None"
            )
        weights = torch.tensor(self.profile, device=each.device).expand(len(each), -1)
        return share_out(weights, layers * each, 1, groups.count.unsqueeze(-1)).T
