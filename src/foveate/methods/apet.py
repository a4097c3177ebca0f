"""ApET: keep the tokens that a few others cannot explain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import register
from .base import EncoderMethod
from .budgets import check_choice, check_range, topk_mask
from .greedy import first_of, one_by_one
from .tokens import EncoderTokens


def farthest_points(states: Tensor, steps: int, start: Tensor) -> Tensor:
    """Tokens in the order of farthest point sampling: each has the largest distance to the nearest of those before it.

    states: (tiles, n, width). steps: in [1, n]. start: (tiles,) the first. Returns int64 (tiles, steps).
    """
    states, tile = states.float(), torch.arange(len(states), device=states.device)
    nearest = torch.full(states.shape[:2], torch.inf, device=states.device)

    def after(pick: Tensor, step: int) -> Tensor:
        torch.minimum(nearest, (states - states[tile, pick].unsqueeze(1)).square().sum(-1), out=nearest)
        return nearest

    first = torch.zeros_like(nearest).scatter(1, start.unsqueeze(1), 1)
    return one_by_one(first, steps, after)


def reconstruction_error(states: Tensor, basis: Tensor) -> Tensor:
    """How far each token is from what the basis makes of it by ridge regression with 1e-5.

    states: (tiles, n, width). basis: (tiles, k) which tokens. Returns float32 (tiles, n), euclidean.
    """
    states = states.float()
    rows = states.gather(1, basis.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    gram = rows @ rows.transpose(1, 2)
    ridge = 1e-5 * torch.eye(basis.shape[1], device=states.device)
    weights = torch.linalg.solve((gram + ridge).double(), (rows @ states.transpose(1, 2)).double()).float()
    return (states - weights.transpose(1, 2) @ rows).norm(dim=-1)


def joined(states: Tensor, takes: Tensor, gives: Tensor, chunk_elements: int = 1 << 24) -> Tensor:
    """Each token that takes becomes the mean of itself and of the tokens that give and are most like it, by cosine.

    states: (tiles, n, width). takes, gives: bool (tiles, n), no token in both. Returns float32 like `states`; where
    nothing takes, nothing changes.
    """
    tiles, n, width = states.shape
    states, directions = states.float(), normalize(states.float(), dim=-1)
    total, count = states.clone(), torch.ones(tiles, n, 1, device=states.device)
    gives = gives & takes.any(1, keepdim=True)
    step = max(1, chunk_elements // (tiles * max(n, width)))
    for start in range(0, n, step):
        part = slice(start, start + step)
        alike = directions[:, part] @ directions.transpose(1, 2)
        nearest = alike.masked_fill(~takes.unsqueeze(1), -torch.inf).argmax(-1)
        # A product, because scattered additions are not repeatable on every device.
        joins = nearest.unsqueeze(1) == torch.arange(n, device=states.device).unsqueeze(-1)
        joins = (joins & gives[:, None, part]).float()
        total += joins @ states[:, part]
        count += joins.sum(-1, keepdim=True)
    return total / count


@register("apet")
@dataclass
class ApET(EncoderMethod):
    """Keep the tokens that a small basis of other tokens reconstructs worst, and the basis itself.

    The basis is spread over the picture's tokens by farthest point sampling. Every token is written as a combination of
    it, and the length of what is missing is the token's score. No attention is read and no [CLS] token needed: the
    tokens are those in front of the projector, or behind it where it joins patches. Tiled models: every tile is worked
    on separately and gets its share of the image's budget.

    keep: fraction of each image's tokens, or tokens per image; 0.25 is this library's default, that of the other
        methods before the LLM. The basis is paid from it.
    basis: how many tokens it has, at least 1; 10 is the default of the authors' code. Of a budget that is not larger,
        one token goes to the worst explained.
    seed: of the first token of the sampling, drawn among all as in the authors' code; None, this library's default,
        begins with the token of the largest norm, so that nothing is drawn.
    slots: "own" keeps the basis at its own places, this library's default; "weakest", as in the authors' code, writes
        it over the best explained of the kept tokens, in their places.
    merge_dropped: let each dropped token go into the mean of the kept one most like it, the basis aside, as the
        authors' code does. Off by default: on glimpse it costs right answers.

    Source: ApET, arXiv 2602.19870, and the authors' code (for LLaVA; for Qwen it keeps half of what it overwrites). Its
    second stage, the same choice again inside the LLM, is not here. Survivors keep their original positions.
    """

    summary = "tokens that a small basis of other tokens reconstructs worst, before the LLM"
    source = "ApET, arXiv 2602.19870"
    reads = frozenset({"states", "features"})

    keep: float | int = 0.25
    basis: int = 10
    seed: int | None = None
    slots: Literal["own", "weakest"] = "own"
    merge_dropped: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("basis", self.basis, 1, integer=True)
        if self.seed is not None:
            check_range("seed", self.seed, 0, integer=True)
        check_choice("slots", self.slots, ("own", "weakest"))

    @property
    def only_drops(self) -> bool:
        return self.slots == "own" and not self.merge_dropped

    def _basis(self, tokens: EncoderTokens) -> Tensor:
        """(tiles, k)"""
        assert tokens.states is not None
        tiles, n, _ = tokens.states.shape
        if self.seed is None:
            start = tokens.states.float().norm(dim=-1).argmax(-1)
        else:
            drawn = torch.randint(n, (1,), generator=torch.Generator("cpu").manual_seed(self.seed))
            start = drawn.to(tokens.device).expand(tiles)
        return farthest_points(tokens.states, min(self.basis, n), start)

    def _parts(self, tokens: EncoderTokens, budget: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens kept for their error, those kept beside them, both bool (tiles, n), and the basis, (tiles, k)."""
        assert tokens.states is not None
        basis, n = self._basis(tokens), tokens.states.shape[1]
        error, paid = reconstruction_error(tokens.states, basis), (budget - 1).clamp(max=basis.shape[1])
        if self.slots == "own":
            beside = first_of(basis, paid, n)
            return topk_mask(error.masked_fill(beside, -torch.inf), budget - paid), beside, basis
        unexplained = topk_mask(error, budget - paid)
        return unexplained, topk_mask(error, budget) & ~unexplained, basis

    def score(self, tokens: EncoderTokens) -> Tensor:
        assert tokens.states is not None
        return reconstruction_error(tokens.states, self._basis(tokens))

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        unexplained, beside, _ = self._parts(tokens, budget)
        return unexplained | beside

    def merge(self, tokens: EncoderTokens, keep: Tensor) -> Tensor | None:
        if self.only_drops:
            return None
        assert tokens.states is not None and tokens.features is not None
        unexplained, beside, basis = self._parts(tokens, keep.sum(-1))
        states = tokens.states.float()
        if self.merge_dropped:
            states = joined(states, unexplained, ~keep)
        changed = unexplained & self.merge_dropped
        if self.slots == "weakest":
            slot = (beside.cumsum(-1) - 1).clamp(0, basis.shape[1] - 1)
            written = basis.gather(1, slot).unsqueeze(-1).expand_as(states)
            states = tokens.states.float().gather(1, written).where(beside.unsqueeze(-1), states)
            changed = changed | beside
        return tokens.project(states.to(tokens.states.dtype)).where(changed.unsqueeze(-1), tokens.features)
