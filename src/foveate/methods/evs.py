"""EVS: the places of a clip that changed least since the frame before leave."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import register
from .base import VideoMethod
from .budgets import topk_mask
from .tokens import VideoTokens


def change(features: Tensor) -> Tensor:
    """1 - the cosine between each token and that at the same place of the frame before; inf in the first frame.

    features: (clips, frames, n, hidden). Returns float32 (clips, frames, n).
    """
    directions = normalize(features.float(), dim=-1)
    changed = 1 - (directions[:, 1:] * directions[:, :-1]).sum(-1)
    return torch.cat([torch.full_like(directions[:, :1, :, 0], torch.inf), changed], dim=1)


@register("evs")
@dataclass
class EVS(VideoMethod):
    """Keep the first frame, and of the others the tokens that differ most from the same place one frame earlier.

    All frames of a clip compete for one budget, so a frame in which nothing happens may lose everything. The first
    frame stays whole even where `keep` asks for less, and so does a still picture, which is a first frame.

    keep: fraction of a clip's tokens, or tokens per frame; 0.25 is this library's default.

    Source: Efficient Video Sampling, arXiv 2510.14624, as vLLM ships it (`--video-pruning-rate`, which is 1 - keep).
    There the cosine is taken in the model's own dtype; here in float32.
    """

    summary = "tokens of a clip that differ most from the frame before, and its first frame, before the LLM"
    source = "EVS, arXiv 2510.14624"
    reads = frozenset({"features"})

    keep: float | int = 0.25

    @property
    def fills_budget(self) -> bool:
        return False  # some frames stay whole, and a picture is one

    def score(self, tokens: VideoTokens) -> Tensor:
        assert tokens.features is not None
        return change(tokens.features)

    def choose(self, tokens: VideoTokens, budget: Tensor) -> tuple[Tensor, Tensor | None]:
        changed = self.score(tokens)
        return topk_mask(changed.flatten(1), budget.clamp(min=tokens.n)).view_as(changed), None
