"""How much stays: what `keep` and other options may be, the budgets they come to, and the choice within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .tokens import ImageGroups


def check_keep(keep: object) -> None:
    """Raise ValueError unless `keep` is a float in (0, 1] or an int >= 1."""
    is_count = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if not is_count and not (isinstance(keep, float) and 0 < keep <= 1):
        raise ValueError(
            f"keep must be a float in (0, 1], the fraction that stays, or an int >= 1, tokens per image; got {keep!r}"
        )


def check_range(name: str, value: object, low: float, high: float = math.inf, *, integer: bool = False) -> None:
    """Raise ValueError unless `low <= value <= high` (and `value` is an int where `integer`)."""
    kinds = int if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high or value == math.inf:
        kind = "an int" if integer else "a number"
        bounds = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {kind} {bounds}, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless the value is one of these words."""
    if value not in choices:
        *others, last = (f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def token_budget(keep: float | int, tokens: int) -> int:
    """How many of `tokens` stay: floor(keep * tokens) for a fraction, min(keep, tokens) for a count; never 0."""
    # The epsilon undoes binary rounding: 0.29 * 100 is 28.999999999999996.
    return min(tokens, keep) if isinstance(keep, int) else max(1, math.floor(keep * tokens + 1e-6))


def share_out(weights: Tensor, total: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """Whole numbers in proportion to `weights`, each in [low, high], that sum to `total`; largest remainders round up.

    weights: (..., parts) of positive numbers. total: (...); beyond what the bounds allow it is met as far as they do.
    low, high: (..., parts) or one number for all. Returns int64 (..., parts).
    """
    weights = weights.double()
    bounds = (torch.as_tensor(bound, device=weights.device) for bound in (low, high))
    floor, ceiling = (bound.double().expand_as(weights) for bound in bounds)
    ceiling, whole = ceiling.maximum(floor), total.double().unsqueeze(-1)

    def filled(level: Tensor) -> Tensor:
        return (level.unsqueeze(-1) * weights.unsqueeze(-2)).clamp(floor.unsqueeze(-2), ceiling.unsqueeze(-2))

    # What is filled grows with the level in straight lines between those at which a part meets a bound.
    bends = torch.cat([floor / weights, ceiling / weights], -1).sort(dim=-1).values
    sums = filled(bends).sum(-1)
    right = torch.searchsorted(sums, whole).clamp(1, sums.shape[-1] - 1)
    (low_bend, high_bend), (low_sum, high_sum) = (
        (values.gather(-1, right - 1), values.gather(-1, right)) for values in (bends, sums)
    )
    part = ((whole - low_sum) / (high_sum - low_sum).clamp(min=1e-12)).clamp(0, 1)
    exact = filled(low_bend + part * (high_bend - low_bend)).squeeze(-2)
    shares = (exact + 1e-9).floor()
    rest = (whole.minimum(ceiling.sum(-1, keepdim=True)) - shares.sum(-1, keepdim=True)).clamp(min=0)
    above = (exact - shares).masked_fill(shares >= ceiling, -torch.inf)
    return (shares + topk_mask(above, rest.squeeze(-1))).long()


def floor_budget(share: Tensor, groups: ImageGroups) -> Tensor:
    """`floor(share * total) - pinned` of each image, at least 1 and at most its candidates.

    share: (..., groups) fraction of each image that stays. Returns int64 of the same shape.
    """
    budget = (share * groups.total + 1e-4).floor().long() - groups.pinned
    return torch.minimum(budget.clamp(min=1), groups.count)


def scaled_layers(layers: tuple[int, ...], of: int, depth: int) -> tuple[int, ...]:
    """Layers that a paper names for a model of `of` layers, at the same relative depth of a model of `depth`.

    Strictly ascending and in [1, depth - 1]; where there is no room for all, the deepest are left out.
    """
    scaled: list[int] = []
    for layer in layers:
        scaled.append(max(min(round(layer * depth / of), depth - 1), scaled[-1] + 1 if scaled else 1))
    return tuple(layer for layer in scaled if layer < depth)


def first_largest(scores: Tensor, most: int) -> Tensor:
    """Indices of the `most` largest of the last dimension, the largest first and of equals the earlier.

    scores: float32 or narrower, no NaN, (..., n). Returns int64 (..., most).
    """
    # One number for the score and the place behind it, whose order is total: a partial sort is then enough.
    bits = (scores.float() + 0.0).view(torch.int32).long()  # + 0.0: both zeros are equal
    rank = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # negative floats are ordered backwards
    place = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return scores.shape[-1] - 1 - (((rank << 31) + place).topk(most, dim=-1).values & 0x7FFFFFFF)


def topk_mask(scores: Tensor, k: Tensor | int) -> Tensor:
    """True for the `k` largest of the last dimension; among equal scores the lower index wins.

    scores: (..., n); -inf marks what may not be chosen. k: (...) or one number. Returns bool (..., n).
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    )
    limit = k.unsqueeze(-1) if isinstance(k, Tensor) else k
    return (rank < limit) & (scores > -math.inf)
