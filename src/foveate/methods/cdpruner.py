"""CDPruner: keep the tokens that a determinantal point process finds most diverse, and relevant to the question."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import register
from .base import EncoderMethod
from .budgets import check_range
from .greedy import LIMIT, Cosines, earliness, first_of, one_by_one
from .tokens import EncoderTokens
from .words import Text, check_text, words_that_count


def relevance(features: Tensor, words: Tensor, counts: Tensor) -> Tensor:
    """Mean cosine of each token with the words that count, stretched to [0, 1] in each tile; 1 where all are alike.

    features: (tiles, n, hidden). words: (tiles, m, hidden), counts: bool (tiles, m). Returns float32 (tiles, n).
    """
    directions, asked = (normalize(each.float(), dim=-1) for each in (features, words))
    mean = (asked * counts.unsqueeze(-1)).sum(1) / counts.sum(1, keepdim=True).clamp(min=1)
    cosine = (directions @ mean.unsqueeze(-1)).squeeze(-1)
    low, high = cosine.amin(1, keepdim=True), cosine.amax(1, keepdim=True)
    return torch.where(high - low < 1e-6, 1.0, (cosine - low) / (high - low).clamp(min=1e-6))


def quality(relevant: Tensor, weight: float) -> Tensor:
    """What each token's row and column of the kernel are multiplied by: 1 at weight 0, the relevance itself at 1.

    In between `exp(weight / (2 (1 - weight)) * relevance)`. relevant: (tiles, n) in [0, 1]. Returns float64, up to one
    factor for a whole tile, which no choice depends on: so that the largest possible is 1.
    """
    if weight == 1:
        return relevant.double()
    return (weight / (2 * (1 - weight)) * (relevant.double() - 1)).exp()


def most_determinant(features: Tensor, worth: Tensor, steps: int, limit: int = LIMIT) -> Tensor:
    """Tokens in the order in which each multiplies the determinant of the kernel of those chosen by most.

    The kernel is `worth_i * cos(i, j) * worth_j`. What a token adds is its own entry, less what the chosen ones say of
    it: worth^2 times the rest of its direction that is at right angles to all of theirs (a Cholesky factor grows by a
    row with each choice). Where less than a millionth is left of every token, the worthiest go on.

    features: (tiles, n, hidden). worth: (tiles, n) in [0, 1]. steps: how many to pick, in [1, n]. limit: of the
    elements in the tables of the tiles that are worked on together. Returns int64 (tiles, steps).
    """
    tiles, n, _ = features.shape
    if tiles > (together := max(1, limit // n**2)):
        parts = zip(features.split(together), worth.split(together), strict=True)
        return torch.cat([most_determinant(*part, steps, limit) for part in parts])
    cosines, tile = Cosines(features, limit), torch.arange(tiles, device=features.device)
    factor = torch.zeros(tiles, steps, n, device=features.device)
    rest = torch.ones(tiles, n, device=features.device)
    gain = worth.double() ** 2

    def after(pick: Tensor, step: int) -> Tensor:
        nonlocal rest
        known = factor[:, :step]
        told = (known[tile, :, pick].unsqueeze(1) @ known).squeeze(1)
        left = rest[tile, pick].unsqueeze(1)
        row = torch.where(left > 1e-6, (cosines.row(pick) - told) / left.clamp(min=1e-6).sqrt(), 0)
        factor[:, step] = row
        rest = rest - row.square()
        return torch.where(rest > 1e-6, rest * gain, gain - 2)

    return one_by_one(gain, steps, after)


@register("cdpruner")
@dataclass
class CDPruner(EncoderMethod):
    """Keep a set of tokens that is diverse, and of which each is like the question's words.

    A determinantal point process prefers sets whose directions span much; tokens that resemble the LLM's embeddings of
    the words count for more. The most likely set is built greedily. The LLM does not run for this, and no second text
    encoder is needed. Tiled models: every tile is worked on separately and gets its share of the image's budget.

    keep: fraction of each image's tokens, or tokens per image; 0.25 is this library's default, that of the other
        methods before the LLM.
    weight: of the relevance, in [0, 1]; 0 is a plain determinantal point process, which reads no question. 0.5 is the
        default of OpenVINO GenAI.
    halves: choose half of the tokens among the first half of a tile and half among the second, each with its own
        relevance from 0 to 1, as OpenVINO GenAI does.
    text: which words: "all" of the prompt, as in OpenVINO GenAI, or those "behind" the sample's first image (all where
        none stands there).

    Source: CDPruner, arXiv 2506.10967, in the form of OpenVINO GenAI's code: relevance is the mean cosine with the
    LLM's own embeddings of the text. The authors' code reads a CLIP text encoder instead, multiplies the kernel by the
    relevance itself (weight 1 here), and the tiles of a picture go apart, as here. Survivors keep their original
    positions; budgets are rounded down.
    """

    summary = "a determinantal point process over the tokens, weighted by the question's words, before the LLM"
    source = "CDPruner, arXiv 2506.10967, OpenVINO GenAI"

    keep: float | int = 0.25
    weight: float = 0.5
    halves: bool = True
    text: Text = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("weight", self.weight, 0, 1)
        check_text(self.text)

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"features", "words"} if self.weight else {"features"})

    def _orders(self, tokens: EncoderTokens) -> list[tuple[Tensor, int]]:
        """Of each half, or of the whole, its tokens as they are picked, as many as any budget asks for, (tiles, steps);
        and how many it has."""
        assert tokens.features is not None
        n = tokens.features.shape[1]
        most, parts, orders = min(n, tokens.most or n), 2 if self.halves and n > 1 else 1, []
        for features in tokens.features.tensor_split(parts, dim=1):  # the first has the odd one
            size = features.shape[1]
            worth = torch.ones(features.shape[:2], dtype=torch.float64, device=features.device)
            if self.weight:
                worth = quality(relevance(features, *words_that_count(tokens, self.text)), self.weight)
            orders.append((most_determinant(features, worth, min(size, math.ceil(most / parts))), size))
        return orders

    def score(self, tokens: EncoderTokens) -> Tensor:
        return torch.cat([earliness(order, size) for order, size in self._orders(tokens)], 1)

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        orders = self._orders(tokens)
        parts = len(orders)
        chosen = [first_of(order, (budget + parts - 1 - i) // parts, size) for i, (order, size) in enumerate(orders)]
        return torch.cat(chosen, 1)
