"""DART: keep the image tokens that least duplicate a few pivot tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import register
from .base import LayerMethod
from .budgets import check_range, floor_budget, topk_mask
from .tokens import LayerTokens


def key_norms(keys: Tensor) -> Tensor:
    """L1 norm of each token's keys over all heads. (*, kv_heads, n, d) -> (*, n), float32."""
    return keys.float().abs().sum((-3, -1))


def pivot_quotas(valid: Tensor, rest: Tensor) -> Tensor:
    """How many tokens each pivot brings: `rest` in equal parts, the remainder to the first pivots.

    valid: bool (groups, pivots). rest: (groups,). Returns int64 (groups, pivots), 0 where not `valid`.
    """
    pivots, place = valid.sum(-1, keepdim=True).clamp(min=1), valid.cumsum(-1) - 1
    rest = rest.unsqueeze(-1)
    return (rest // pivots + (place < rest % pivots)) * valid


def least_similar(similarity: Tensor, start: Tensor, present: Tensor, quotas: Tensor) -> Tensor:
    """Pivot by pivot, the tokens least similar to it among those that nobody has taken yet.

    similarity: (groups, pivots, n). start: bool (groups, n), taken before the first pivot. present: bool (groups, n).
    quotas: (groups, pivots). Returns bool (groups, n), `start` included.
    """
    kept = start
    for pivot in range(similarity.shape[1]):
        free = (-similarity[:, pivot]).masked_fill(kept | ~present, -torch.inf)
        kept = kept | topk_mask(free, quotas[:, pivot])
    return kept


@register("dart")
@dataclass
class DART(LayerMethod):
    """Keep a few pivots, and the image tokens that are least similar to them: duplicates go.

    Pivots are the image tokens and the text tokens (from the sample's first image on) with the largest L1 norm of
    their keys, over all heads, in layer `layer - 1`. One pivot after the other, image pivots first and larger norms
    first, brings its share of the image tokens whose hidden states behind that layer, passed through the model's final
    norm, have the smallest cosine similarity to its own; no token is taken twice. Image pivots stay and are paid from
    the budget, which is met exactly. Every image of a sample has image pivots of its own; the text pivots are the
    sample's.

    keep: fraction of each image's tokens, or tokens per image; 0.222 is the authors' setting for a nominal 128 of 576
        tokens (their script keeps 132, this rule 127; `keep=128` gives 128).
    layer: the first layer without the dropped tokens; 2 is reported.
    image_pivots, text_pivots: how many of each; 4 and 4 are reported. Shorter texts have fewer pivots.

    Source: DART, arXiv 2502.11494; rule and numbers from third-party copies of the authors' code. There every
    pivot brings the same whole number of tokens, and pivots take their turns in the order of a Python set.
    """

    summary = "tokens that duplicate high-norm pivot tokens leave after an early layer"
    source = "DART, arXiv 2502.11494"

    keep: float | int = 0.222
    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("layer", self.layer, 1, integer=True)
        check_range("image_pivots", self.image_pivots, 0, integer=True)
        check_range("text_pivots", self.text_pivots, 0, integer=True)
        if self.image_pivots + self.text_pivots == 0:
            raise ValueError("image_pivots + text_pivots must be >= 1, got 0")

    def stages(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def select(self, tokens: LayerTokens) -> Tensor:
        assert tokens.left is not None
        groups, present = tokens.groups, tokens.groups.present
        budget = floor_budget(self.share(groups), groups)
        norms = key_norms(tokens.image_keys()).masked_fill(~present, -torch.inf)
        started = topk_mask(norms, budget.clamp(max=self.image_pivots))
        of_images = norms.argsort(dim=-1, descending=True, stable=True)[:, : self.image_pivots]

        at = (tokens.text + tokens.past).clamp(min=0)[:, None, :, None]
        text_keys = tokens.key.gather(2, at.expand(-1, tokens.key.shape[1], -1, tokens.key.shape[3]))
        text_norms = key_norms(text_keys).masked_fill(tokens.text < 0, -torch.inf)
        of_text = text_norms.argsort(dim=-1, descending=True, stable=True)[:, : self.text_pivots]

        left = tokens.norm(tokens.left).float()
        states = normalize(tokens.image_rows(left), dim=-1)
        text = normalize(tokens.text_rows(left), dim=-1)
        width = states.shape[-1]
        pivots = torch.cat(
            [
                states.gather(1, of_images.unsqueeze(-1).expand(-1, -1, width)),
                text.gather(1, of_text.unsqueeze(-1).expand(-1, -1, width))[groups.row],
            ],
            dim=1,
        )
        valid = torch.cat([started.gather(1, of_images), (tokens.text >= 0).gather(1, of_text)[groups.row]], dim=1)
        quotas = pivot_quotas(valid, budget - started.sum(-1))
        return least_similar(pivots @ states.transpose(1, 2), started, present, quotas)
