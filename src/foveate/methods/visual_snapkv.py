"""Visual SnapKV: an observation window at the prompt's end votes for the image entries that stay in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from . import register
from .base import CacheMethod
from .budgets import check_range
from .tokens import LayerTokens


def pool_neighbours(scores: Tensor, kernel: int) -> Tensor:
    """Mean over the `kernel` tokens around each one, fewer where the image begins and ends.

    scores: (groups, heads, n), -inf at padding, which stays. kernel: odd.
    """
    present = scores.isfinite()
    both = torch.cat([scores.masked_fill(~present, 0), present.to(scores.dtype)])
    total, count = avg_pool1d(both, kernel, stride=1, padding=kernel // 2).chunk(2)
    return (total / count).masked_fill(~present, -torch.inf)


@register("visual_snapkv")
@dataclass
class VisualSnapKV(CacheMethod):
    """SnapKV on the image tokens alone: keep what the last rows of the prompt attend to, other tokens in other heads.

    The attention of the last `window` rows is averaged over the rows, over the query heads that share a KV head and
    over neighbouring tokens of the image; each KV head keeps the top tokens of every image. Text always stays.

    keep: fraction of each image's tokens, or tokens per image; 0.4 is this library's default, the same as that of
        plphp, so that the two compare.
    window: rows at the prompt's end, text or image; 32 is the default of the authors' code.
    kernel: width of the pooling along an image's tokens, odd; 5 is the default of the authors' code, 1 pools nothing.

    Raises:
        ValueError: also for an even `kernel`.

    Source: SnapKV, arXiv 2404.14469, and the authors' code, which ranks all entries in front of the window and always
    keeps the window. The restriction to image tokens is this library's.
    """

    summary = "attention of the prompt's last rows, pooled along the image, evicts per head"
    source = "SnapKV, arXiv 2404.14469"

    keep: float | int = 0.4
    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("window", self.window, 1, integer=True)
        check_range("kernel", self.kernel, 1, integer=True)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be an odd int >= 1, got {self.kernel}")

    def score(self, tokens: LayerTokens) -> Tensor:
        rows = tokens.recent(self.window)
        mean = tokens.received(rows) / (rows >= 0).sum(1)[:, None, None]
        return pool_neighbours(tokens.per_kv_head(tokens.of_images(mean)), self.kernel)

    def mass(self, scores: Tensor) -> Tensor:
        return scores.sum(1)
