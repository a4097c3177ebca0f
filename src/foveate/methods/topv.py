"""TopV: keep the image tokens that contribute most to a layer's output, by optimal transport."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import register
from .base import LayerMethod
from .budgets import check_range, floor_budget, topk_mask
from .tokens import LayerTokens


def landmarks(present: Tensor, limit: int = 1024) -> tuple[Tensor, Tensor]:
    """At most `limit` of each image's tokens, at an even stride (costs stay linear); all where there are no more.

    present: bool (groups, n). Returns index (groups, m) and valid, bool (groups, m), with m = min(n, limit).
    """
    count, n = present.sum(-1, keepdim=True), present.shape[1]
    steps = torch.arange(min(n, limit), device=present.device)
    some = count.clamp(max=len(steps))
    place = (2 * steps + 1) * count // (2 * some).clamp(min=1)
    in_order = (~present).to(torch.uint8).argsort(dim=-1, stable=True)
    return in_order.gather(1, place.clamp(max=n - 1)), steps < some


def transport_cost(
    source: Tensor,
    target: Tensor,
    source_at: Tensor,
    target_at: Tensor,
    weights: tuple[float, float, float],
    sigma: float,
) -> Tensor:
    """What it costs that a source token makes a target token; each of three terms lies in [0, 1].

    Half the distance of the two features, scaled to unit length; 1 - exp(-d^2 / (2 sigma^2)) of their distance d in
    the picture; and the distance of the source from the picture's middle, 1 in a corner.

    source: (groups, n, hidden), target: (groups, m, hidden). source_at, target_at: (groups, n | m, 2) in [0, 1].
    weights: of the three terms. Returns float32 (groups, n, m).
    """
    cosine = normalize(source.float(), dim=-1) @ normalize(target.float(), dim=-1).transpose(1, 2)
    feature = ((1 - cosine).clamp(min=0) / 2).sqrt()
    apart = (source_at.unsqueeze(2) - target_at.unsqueeze(1)).float().square().sum(-1)
    off_center = (source_at.float() - 0.5).norm(dim=-1, keepdim=True) / 0.5**0.5
    return weights[0] * feature + weights[1] * (1 - (-apart / (2 * sigma**2)).exp()) + weights[2] * off_center


def contribution(cost: Tensor, present: Tensor, valid: Tensor, epsilon: float, iterations: int) -> Tensor:
    """What each source contributes to all targets: the logarithm of the row sums of the transport plan.

    Sinkhorn's algorithm between equal masses, in logarithms. It begins and ends with the targets, so that each receives
    its whole mass; `iterations - 1` times in between the sources are rescaled to equal masses, too. Were that the last
    step, or did it converge, all row sums would be equal and rank nothing.

    cost: (groups, n, m). present: bool (groups, n). valid: bool (groups, m). Returns (groups, n), -inf at padding.
    """
    gain = -cost / epsilon
    give = torch.zeros(cost.shape[:2], dtype=cost.dtype, device=cost.device).masked_fill(~present, -torch.inf)
    rows = give
    for iteration in range(iterations):
        if iteration:
            give = (give - rows).masked_fill(~present, -torch.inf)
        take = -(gain + give.unsqueeze(2)).logsumexp(1)
        rows = give + (gain + take.masked_fill(~valid, -torch.inf).unsqueeze(1)).logsumexp(2)
    return rows


def spread_over(candidates: Tensor, budget: Tensor) -> Tensor:
    """`budget` of the candidates at an even stride.

    candidates: bool (groups, n). budget: (groups,). Returns bool (groups, n).
    """
    place, count = candidates.cumsum(-1), candidates.sum(-1, keepdim=True).clamp(min=1)
    budget = budget.unsqueeze(-1)
    upto = (place * budget + count // 2) // count
    before = ((place - 1) * budget + count // 2) // count
    return candidates & (upto > before)


@register("topv")
@dataclass
class TopV(LayerMethod):
    """Keep the image tokens from which the output of an early layer can be had most cheaply; reads no attention.

    Sources are the image tokens that enter layer `layer - 1`, targets those that leave it. A transport plan between
    them (Sinkhorn) says how much every source contributes. The largest contributions stay; a part of the budget goes
    to an even stride over the rest, so that no region is lost altogether. Survivors keep their order and position ids.

    keep: fraction of each image's tokens, or tokens per image; 0.5 is reported.
    layer: the first layer without the dropped tokens; 2 is reported.
    recover: share of the budget for the even stride, in [0, 1]; 0.2 is this library's default: with half the tokens
        kept first, every fourth of the others is reported, a fifth of all that stay.
    alpha, beta, gamma: weights of feature distance, distance in the picture and distance from its middle; 1, 1 and
        0.01 are this library's defaults (a third party's), since the published values are unknown.
    sigma: reach of the distance in the picture, of whose sides each counts 1; 0.4 is this library's default.
    epsilon: temperature of the plan; 0.1 is this library's default.
    iterations: of Sinkhorn. 1 is this library's default: only what the targets receive is prescribed, and what the
        sources give is free. 3 is reported; every further one pushes the sources towards equal contributions.

    Source: TopV, arXiv 2503.18278 (parts and their order from the abstract and Figure 1's caption; terms, iterations
    and stride from secondary descriptions; how contributions follow from the plan is inferred, since no code is
    public). Images with more than 1024 tokens take 1024 of them, at an even stride, as targets.
    """

    summary = "optimal transport from a layer's input to its output says which tokens contribute"
    source = "TopV, arXiv 2503.18278"

    keep: float | int = 0.5
    layer: int = 2
    recover: float = 0.2
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.01
    sigma: float = 0.4
    epsilon: float = 0.1
    iterations: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("layer", self.layer, 1, integer=True)
        check_range("recover", self.recover, 0, 1)
        for name, low in dict(alpha=0, beta=0, gamma=0, sigma=1e-3, epsilon=1e-3).items():
            check_range(name, getattr(self, name), low)
        check_range("iterations", self.iterations, 1, integer=True)

    def stages(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def score(self, tokens: LayerTokens) -> Tensor:
        groups, present = tokens.groups, tokens.groups.present
        assert tokens.entered is not None and tokens.left is not None and groups.centers is not None
        at, valid = landmarks(present)
        left = tokens.image_rows(tokens.left)
        cost = transport_cost(
            tokens.image_rows(tokens.entered),
            left.gather(1, at.unsqueeze(-1).expand(-1, -1, left.shape[-1])),
            groups.centers,
            groups.centers.gather(1, at.unsqueeze(-1).expand(-1, -1, 2)),
            (self.alpha, self.beta, self.gamma),
            self.sigma,
        )
        return contribution(cost, present, valid, self.epsilon, self.iterations)

    def select(self, tokens: LayerTokens) -> Tensor:
        groups, present = tokens.groups, tokens.groups.present
        budget = floor_budget(self.share(groups), groups)
        recovered = (self.recover * budget.double() + 1e-6).floor().long()
        best = topk_mask(self.score(tokens), budget - recovered)
        return best | spread_over(present & ~best, recovered)
