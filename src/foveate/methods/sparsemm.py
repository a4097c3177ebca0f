"""SparseMM: heads of the KV cache that look at what an answer names keep more of the picture than the others."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from ..errors import UnsupportedError
from . import register
from .base import CacheMethod
from .baselines import seeded
from .budgets import check_choice, check_range, floor_budget, topk_mask
from .tokens import LayerTokens
from .trained import TrainedMethod
from .visual_snapkv import VisualSnapKV

if TYPE_CHECKING:
    from .host import Host


def hits(attention: Tensor, shows: Tensor) -> Tensor:
    """How often a head looks most at what an answer names, worth less the larger that is: what scores a visual head.

    attention: (batch, heads, r, keys) of the rows that write the answer. shows: bool (batch, r, keys), the image tokens
    that show what a row is about to name, none in rows that do not count. Returns (batch, heads): 1 over their number
    for each row whose largest attention is on one of them.
    """
    hit = shows.unsqueeze(1).expand_as(attention).gather(3, attention.argmax(-1, keepdim=True)).squeeze(3)
    return (hit / shows.sum(-1).clamp(min=1).unsqueeze(1)).sum(-1)


def head_budgets(scores: Tensor, each: Tensor, count: Tensor, floor: float) -> Tensor:
    """How many tokens of an image each head keeps: `floor` of the mean, and of the rest as much as its score is.

    What a head cannot keep, since the image has no more tokens, goes to the others in proportion; so all heads together
    keep `each` times their number. Whole numbers by the largest remainders.

    scores: (heads,) not negative, of all layers. each: (groups,) tokens that a head keeps in the mean, at least 1.
    count: (groups,) of the image, not fewer. Returns int64 (groups, heads), each in [1, count].
    """
    heads, low = len(scores), (floor * each + 1e-9).floor().clamp(min=1)
    room, rest = (count - low).double().unsqueeze(1), (heads * (each - low)).double().unsqueeze(1)
    # Heads without a score share what all others have no room for.
    weights = scores.double() / scores.double().sum().clamp(min=1e-300)
    ordered, order = weights.clamp(min=1e-9).sort(descending=True, stable=True)
    full = torch.arange(heads, device=scores.device)
    behind = ordered.flip(0).cumsum(0).flip(0)
    # With the k first heads full, the others have so much for each of their score.
    level = ((rest - full * room).clamp(min=0) / behind).clamp(min=0)
    filled = (ordered * level > room * (1 + 1e-12)).sum(1, keepdim=True).clamp(max=heads - 1)
    exact = torch.minimum(ordered * level.gather(1, filled), room)
    exact = torch.where(full < filled, room, exact)
    whole = (exact + 1e-9).floor()
    left = (rest - whole.sum(1, keepdim=True)).round().clamp(min=0)
    whole += topk_mask((exact - whole).masked_fill(whole >= room, -torch.inf), left.squeeze(1))
    return torch.empty_like(whole).scatter(1, order.expand_as(whole), whole).long() + low.unsqueeze(1).long()


@register("sparsemm")
@dataclass
class SparseMM(TrainedMethod, VisualSnapKV):
    """Evict most in heads that do not look at pictures: each KV head of each layer keeps a number of its own.

    Few heads look where an answer's words are to be seen. Their scores, measured once on pictures whose answers have a
    known place, share out the budget of all heads of all layers; inside a head stays what the prompt's last rows attend
    to, as in visual_snapkv, but with the largest of neighbours instead of their mean. Text always stays. A layer's
    cache has slots for its widest head, so that it frees less memory than `keep` says.

    keep: mean fraction of each image's tokens over all heads, or tokens per image; 0.25 is this library's default.
    window: rows at the prompt's end that vote; 32 as in the authors' code.
    kernel: width of the pooling along an image's tokens, odd; 7 as in the authors' code, 1 pools nothing.
    floor: the part of the mean budget that every head has whatever its score, in [0, 1]; 0.1 as in the authors' code.
        One token in any case.
    heads: "visual" for measured scores, or "random", which is there to compare with.
    seed: of the random ones.
    weights: a file of scores that `python training/sparsemm.py` measured on your model, or a folder with one; None for
        those that come with the library, for glimpse.

    Raises:
        ValueError: also for an even `kernel`.

    Source: SparseMM, arXiv 2506.05344, and the authors' code (scores, shares, pooling). There a head that should keep
    more tokens than there are loses the surplus; here the others get it, so that `keep` is met. There all entries in
    front of the window compete and the window stays; here image tokens alone, and every image has its own budget.
    """

    summary = "heads that look at what answers name keep more, each a number of its own, evicted per head"
    source = "SparseMM, arXiv 2506.05344"
    uneven_heads: ClassVar[bool] = True

    keep: float | int = 0.25
    kernel: int = 7
    floor: float = 0.1
    heads: Literal["visual", "random"] = "visual"
    seed: int = 0

    mass = CacheMethod.mass  # what heads keep depends on each other

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("floor", self.floor, 0, 1)
        check_choice("heads", self.heads, ("visual", "random"))
        check_range("seed", self.seed, 0, integer=True)

    def initial(self, host: Host) -> dict[str, Tensor]:
        return {"heads": seeded(self.seed, host.depth, host.heads).to(host.device)}

    def for_host(self, host: Host) -> SparseMM:
        if self.keeps_all:
            return self
        given = self.heads == "visual" or "_tensors" in self.__dict__
        bound = copy.copy(super().for_host(host) if given else self.holding(self.initial(host)))
        scores = bound.tensors["heads"]
        if scores.shape != (host.depth, host.heads):
            shape = " layers of ".join(map(str, scores.shape))
            raise UnsupportedError(
                f"these scores are of {shape} heads, and this decoder has {host.depth} layers of {host.heads}: measure "
                "its own (python training/sparsemm.py)"
            )
        bound.__dict__.update(_evicting=host.evicting, _scores=scores[list(host.evicting)])
        return bound  # type: ignore[return-value]

    def score(self, tokens: LayerTokens) -> Tensor:
        rows = tokens.recent(self.window)
        looks = tokens.per_kv_head(tokens.of_images(tokens.mean_attention(rows)))
        pooled = max_pool1d(looks, self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.masked_fill(looks == -torch.inf, -torch.inf)

    def budget(self, scores: Tensor, tokens: LayerTokens) -> Tensor:
        """(groups, kv_heads | 1)."""
        held, groups = self.__dict__, tokens.groups
        shares = held["_scores"].to(scores.device).unflatten(1, (scores.shape[1], -1)).sum(-1)
        each = floor_budget(self.share(groups), groups)
        budgets = head_budgets(shares.flatten(), each, groups.count, self.floor)
        return budgets.unflatten(1, shares.shape)[:, held["_evicting"].index(tokens.layer)]
