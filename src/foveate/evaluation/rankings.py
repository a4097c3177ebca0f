"""Do the layers of a model rank the image tokens alike? What searching layer by layer rests on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.methods.base import CacheMethod
from foveate.methods.tokens import LayerTokens

from .runner import Batch, generate


def kendall(scores: Tensor, chunk_elements: int = 1 << 24) -> Tensor:
    """Kendall's tau-b between all pairs of rankings.

    scores: (rankings, n). Returns float64 (rankings, rankings); NaN beside a ranking in which all are equal.
    """
    rankings, n = scores.shape
    gram = torch.zeros(rankings, rankings, dtype=torch.float64)
    step = max(1, chunk_elements // (rankings * n))
    for start in range(0, n, step):
        order = (scores[:, start : start + step, None] - scores[:, None, :]).sign().flatten(1).float()
        gram += (order @ order.T).cpu().double()  # whole numbers, small enough to be exact
    scale = gram.diagonal().sqrt()
    return gram / scale.unsqueeze(0) / scale.unsqueeze(1)


@dataclass
class Watch(CacheMethod):
    """Keeps everything, and notes how every layer ranks the tokens of every image.

    rank: scores of one layer's image tokens, (groups, n), -inf at padding. seen: of each layer, its images' scores.
    """

    name = "watch"
    summary, source = "keeps everything", "this library"

    keep: float | int = 1.0
    rank: Callable[[LayerTokens], Tensor] = field(default=lambda tokens: tokens.last_attention().mean(1))
    seen: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def keeps_all(self) -> bool:
        """It does; but then nothing would be asked."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """As of other methods; what it notes is no option."""
        return {"method": self.name, "keep": self.keep}

    def score(self, tokens: LayerTokens) -> Tensor:
        """What `rank` says, noted."""
        scores = self.rank(tokens)
        self.seen.setdefault(tokens.layer, []).extend(row[row > -torch.inf].float() for row in scores)
        return scores.unsqueeze(1)

    def select(self, scores: Tensor, budget: Tensor) -> Tensor:
        """All."""
        return scores > -torch.inf


def agreement(model: Any, processor: Any, batches: Iterable[Batch], rank: Callable[[LayerTokens], Tensor]) -> Tensor:
    """Kendall's tau between the rankings of all layers of an untouched model, mean over images: (layers, layers)."""
    import foveate

    watch = Watch(rank=rank)
    with foveate.prune(model, watch):
        generate(model, processor, batches, max_new_tokens=1)
    layers = [watch.seen[layer] for layer in sorted(watch.seen)]
    return torch.stack([kendall(torch.stack(image)) for image in zip(*layers, strict=True)]).nanmean(0)
