"""DivPrune: keep the tokens that are least alike, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import register
from .base import EncoderMethod
from .greedy import LIMIT, Cosines, first_of, one_by_one
from .tokens import EncoderTokens


def farthest_first(features: Tensor, steps: int, limit: int = LIMIT) -> Tensor:
    """Tokens in the order in which max-min diversity picks them.

    The first is the one farthest from its nearest neighbour, each further one that farthest from the nearest of
    those picked, in cosine distance; the earlier token on a tie.

    features: (tiles, n, hidden). steps: how many to pick, in [1, n]. limit: of the elements in a table of
    similarities. Tiles are worked on together as far as their tables fit; of a tile whose own n x n do not fit,
    every step works out the row that it needs. Returns int64 (tiles, steps).
    """
    tiles, n, _ = features.shape
    if tiles > (together := max(1, limit // n**2)):
        return torch.cat([farthest_first(part, steps, limit) for part in features.split(together)])
    cosines = Cosines(features, limit)
    nearest = features.new_full((tiles, n), -torch.inf, dtype=torch.float32)
    for start, similar in cosines.blocks():
        part = slice(start, start + similar.shape[1])
        similar.diagonal(start, 1, 2).fill_(-torch.inf)
        # Two tokens that are each other's nearest tie; with both triangles of the table they do in spite of rounding.
        nearest = torch.maximum(nearest, similar.amax(1))
        nearest[:, part] = torch.maximum(nearest[:, part], similar.amax(2))
    closest = torch.full_like(nearest, -torch.inf)

    def after(pick: Tensor, step: int) -> Tensor:
        torch.maximum(closest, cosines.row(pick), out=closest)
        return -closest

    return one_by_one(-nearest, steps, after)


def distances(features: Tensor, order: Tensor) -> Tensor:
    """How far each token is, in cosine distance, from the nearest of those picked before it: (tiles, n), in [0, 2].

    The first pick counts as much as the second. features: (tiles, n, hidden). order: (tiles, n), all tokens as picked.
    """
    picked = normalize(features.float(), dim=-1).gather(1, order.unsqueeze(-1).expand_as(features))
    later = torch.ones(order.shape[1], order.shape[1], dtype=torch.bool, device=order.device).triu()
    far = 1 - (picked @ picked.transpose(1, 2)).masked_fill(later, -1).amax(-1)
    far[:, 0] = far[:, 1:2].amax(-1) if order.shape[1] > 1 else 1
    return torch.zeros_like(far).scatter(1, order, far.clamp(min=0))


@register("divprune")
@dataclass
class DivPrune(EncoderMethod):
    """Keep the most diverse tokens: greedily, the one farthest in cosine distance from all that were kept.

    The tokens are compared as the LLM will see them; neither attention nor the prompt takes part. The first is
    the token farthest from its nearest neighbour. Tiled models: every tile is worked on separately and gets its
    share of the image's budget.

    keep: fraction of each image's tokens, or tokens per image; 0.25 is this library's default, that of the other
        methods before the LLM.

    Source: DivPrune, arXiv 2503.02175, and the authors' code. There all tokens of a prompt's image compete, tiles
    included, the budget is rounded to the nearest number instead of down, and positions are closed up; survivors keep
    their original positions here.
    """

    summary = "greedy max-min diversity of the tokens' features, before the LLM"
    source = "DivPrune, arXiv 2503.02175"
    reads = frozenset({"features"})

    keep: float | int = 0.25

    def score(self, tokens: EncoderTokens) -> Tensor:
        assert tokens.features is not None
        return distances(tokens.features, farthest_first(tokens.features, tokens.features.shape[1]))

    def mass(self, tokens: EncoderTokens) -> Tensor:
        return self.score(tokens)

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        assert tokens.features is not None
        n = tokens.features.shape[1]
        return first_of(farthest_first(tokens.features, min(n, tokens.most or n)), budget, n)
