"""DyCoke, its first stage: in windows of four frames, what repeats an earlier frame leaves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import register
from .base import VideoMethod
from .budgets import share_out, topk_mask
from .tokens import VideoTokens

WINDOW = 4
BACK = (0, 1, 2, 1)  # how far back the frame lies that each frame of a window is compared with


def repetition(features: Tensor) -> Tensor:
    """The cosine between each token and that at the same place of the frame it is compared with; -1 in first frames.

    features: (clips, frames, n, hidden). Returns float32 (clips, frames, n).
    """
    directions = normalize(features.float(), dim=-1)
    frame = torch.arange(features.shape[1], device=features.device)
    back = torch.tensor(BACK, device=features.device)[frame % WINDOW]
    alike = (directions * directions[:, frame - back]).sum(-1)
    return alike.where((back > 0).unsqueeze(-1), -1)


@register("dycoke")
@dataclass
class DyCoke(VideoMethod):
    """Keep the first frame of every four, and of the others the tokens that repeat an earlier frame least.

    The second and the fourth frame of a window are compared with the one before them, the third with the first, place
    by place. Each of the three keeps equally many. The first ones stay whole even where `keep` asks for less, and so
    does a still picture. DyCoke's second stage, which chooses again while decoding, is not part of this method.

    keep: fraction of a clip's tokens, or tokens per frame; 0.475 is what a merging ratio of 0.7, the default of the
        authors' code, leaves of whole windows.

    Source: DyCoke, arXiv 2411.15024, and the authors' code. There the third frame of the last window and a frame
    without a partner go other ways, and a pair reads the likeness of the pair before it, which looks like a slip; here
    all windows are alike and every frame is compared with its own.
    """

    summary = "the first of every four frames, and what repeats it least in the others, before the LLM"
    source = "DyCoke, arXiv 2411.15024 (stage 1)"
    reads = frozenset({"features"})

    keep: float | int = 0.475

    @property
    def fills_budget(self) -> bool:
        return False  # some frames stay whole, and a picture is one

    def score(self, tokens: VideoTokens) -> Tensor:
        assert tokens.features is not None
        return -repetition(tokens.features)

    def choose(self, tokens: VideoTokens, budget: Tensor) -> tuple[Tensor, Tensor | None]:
        whole = (torch.arange(tokens.frames, device=tokens.device) % WINDOW == 0).expand(tokens.clips, -1)
        anchors = whole.sum(-1) * tokens.n
        others = share_out((~whole).double() + 1e-9, (budget - anchors).clamp(min=0), 0, tokens.n * ~whole)
        return topk_mask(self.score(tokens), others + tokens.n * whole), None
