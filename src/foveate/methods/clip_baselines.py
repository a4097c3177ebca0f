"""Baselines over the frames of a clip; `random` and `uniform` draw inside each frame instead."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import register
from .base import VideoMethod
from .baselines import Seeded, evenly, seeded
from .budgets import topk_mask
from .tokens import VideoTokens


@register("random_clip")
@dataclass
class RandomClip(Seeded, VideoMethod):
    """Keep tokens drawn at random from all frames of a clip together; `random` draws the same places in each frame.

    keep: fraction of a clip's tokens, or tokens per frame; 0.25 is this library's default.
    seed: of the draw, which depends on it and on the clip's size alone.

    Source: a baseline of this library.
    """

    summary = "baseline: tokens drawn at random (seeded) from all frames of a clip, before the LLM"
    source = "baseline"

    def score(self, tokens: VideoTokens) -> Tensor:
        return seeded(self.seed, tokens.frames, tokens.n).to(tokens.device).expand(tokens.clips, -1, -1)

    def choose(self, tokens: VideoTokens, budget: Tensor) -> tuple[Tensor, Tensor | None]:
        scores = self.score(tokens)
        return topk_mask(scores.flatten(1), budget).view(scores.shape), None


@register("uniform_frames")
@dataclass
class UniformFrames(VideoMethod):
    """Keep whole frames at an even stride, as many as the budget pays for: what sampling fewer frames would do.

    What is left of the budget goes to an even stride over the other frames' tokens. A still picture keeps an even
    stride of its tokens, as under `uniform`.

    keep: fraction of a clip's tokens, or tokens per frame; 0.25 is this library's default.

    Source: a baseline of this library.
    """

    summary = "baseline: whole frames of a clip at an even stride, before the LLM"
    source = "baseline"

    keep: float | int = 0.25

    def choose(self, tokens: VideoTokens, budget: Tensor) -> tuple[Tensor, Tensor | None]:
        every = torch.ones(tokens.clips, tokens.frames, dtype=torch.bool, device=tokens.device)
        whole = evenly(every, budget // tokens.n).unsqueeze(-1).expand(-1, -1, tokens.n).flatten(1)
        rest = evenly(~whole, budget % tokens.n)
        return (whole | rest).unflatten(1, (tokens.frames, tokens.n)), None
