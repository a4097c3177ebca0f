"""VidCom2: tokens that are unlike their clip and unlike their frame stay, more of them in frames that stand out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import register
from .base import VideoMethod
from .budgets import check_range, share_out, topk_mask
from .tokens import VideoTokens


def quiet_channels(features: Tensor) -> Tensor:
    """The half of the channels that vary least over a clip, at length 1: float32 (clips, frames, n, hidden // 2).

    features: (clips, frames, n, hidden).
    """
    features = features.float()
    spread = features.var(dim=(1, 2), correction=0)
    quiet = spread.argsort(dim=-1, stable=True)[:, : max(1, spread.shape[-1] // 2)].sort(dim=-1).values
    return normalize(features.gather(3, quiet[:, None, None].expand(*features.shape[:3], -1)), dim=-1)


def likeness(points: Tensor, center: Tensor) -> Tensor:
    """A sum of Gaussians of the distance to a centre, of the variances 1/8, 1/4, 1/2, 1 and 2.

    points: (..., d). center: (..., d), which broadcasts. Returns (...).
    """
    squared = points.square().sum(-1) + center.square().sum(-1) - 2 * (points * center).sum(-1)
    return torch.stack([(-squared / (2 * 2.0**power)).exp() for power in range(-3, 2)]).sum(0)


@register("vidcom2")
@dataclass
class VidCom2(VideoMethod):
    """Keep in each frame the tokens that are least like the mean of the clip and the mean of the frame.

    A frame that is unlike the clip as a whole keeps more: its share of the budget is 1 + p - the mean of p, p being the
    softmax over frames of the unlikeness divided by `temperature`. No attention is read. Of a still picture both means
    are the same, and its outliers stay.

    keep: fraction of a clip's tokens, or tokens per frame; 0.25 is the authors' default.
    temperature: of the softmax over frames, in [1e-4, 10]; 0.01 is the authors' code's.

    Source: VidCom2, arXiv 2505.14454, and the authors' code, which rounds each frame's share to the nearest number;
    here the shares add up to the budget.
    """

    summary = "tokens unlike their clip and their frame, more in frames that stand out, before the LLM"
    source = "VidCom2, arXiv 2505.14454"
    reads = frozenset({"features"})

    keep: float | int = 0.25
    temperature: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("temperature", self.temperature, 1e-4, 10)

    def _likeness(self, tokens: VideoTokens) -> tuple[Tensor, Tensor]:
        """Of each token to the mean of its clip, and to that of its frame, both (clips, frames, n)."""
        assert tokens.features is not None
        points = quiet_channels(tokens.features)
        means = points.mean((1, 2), keepdim=True), points.mean(2, keepdim=True)
        return likeness(points, means[0]), likeness(points, means[1])

    def score(self, tokens: VideoTokens) -> Tensor:
        of_clip, of_frame = self._likeness(tokens)
        return -(of_clip + of_frame)

    def choose(self, tokens: VideoTokens, budget: Tensor) -> tuple[Tensor, Tensor | None]:
        of_clip, of_frame = self._likeness(tokens)
        stands_out = (-of_clip.mean(-1) / self.temperature).softmax(-1)
        shares = share_out(1 + stands_out - 1 / tokens.frames, budget, 1, tokens.n)
        return topk_mask(-(of_clip + of_frame), shares), None
