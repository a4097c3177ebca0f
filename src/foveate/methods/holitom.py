"""HoliTom, its outer part: what stands still through a window of frames becomes one token, and the rest is ranked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import register
from .base import VideoMethod
from .budgets import check_range, share_out, topk_mask
from .clustering import cluster_means, density_peaks
from .tokens import VideoTokens


def still_until(features: Tensor, alike: float) -> Tensor:
    """The last frame up to which each place stands still from a frame on: int64 (clips, frames, n).

    A place stands still from one frame to the next where the cosine of its tokens is above `alike`.
    features: (clips, frames, n, hidden).
    """
    directions = normalize(features.float(), dim=-1)
    moves = (directions[:, 1:] * directions[:, :-1]).sum(-1) <= alike
    frame, last = torch.arange(features.shape[1], device=features.device), features.shape[1] - 1
    ends = torch.where(torch.nn.functional.pad(moves, (0, 0, 0, 1)), frame.unsqueeze(-1), last)
    return ends.flip(1).cummin(1).values.flip(1)


def windows(until: Tensor) -> tuple[Tensor, Tensor]:
    """Cut clips into windows of frames such that the most tokens are saved where windows stand still.

    A window from s to e saves e - s tokens at each place that stands still through it. Of equal cuts the one with the
    shorter last window counts. until: as `still_until` returns it. Returns the first and the last frame of each frame's
    window, int64 (clips, frames).
    """
    clips, frames, _ = until.shape
    frame = torch.arange(frames, device=until.device)
    ending = until.new_zeros(clips, frames, frames).scatter_add(2, until, torch.ones_like(until))
    still = ending.flip(2).cumsum(2).flip(2)  # places that stand still from one frame to another
    saved = still * (frame - frame.unsqueeze(-1)).clamp(min=0)
    best, starts = until.new_zeros(clips, frames + 1), until.new_zeros(clips, frames)
    for end in range(frames):  # each cut builds on the ones before it
        value = (best[:, : end + 1] + saved[:, : end + 1, end]) * (frames + 1) + frame[: end + 1]
        top = value.amax(-1)
        best[:, end + 1], starts[:, end] = top // (frames + 1), top % (frames + 1)
    first, last = torch.empty_like(starts), torch.empty_like(starts)
    ends = starts.new_full((clips, 1), frames - 1)
    for at in range(frames - 1, -1, -1):
        start = starts.gather(1, ends)
        first[:, at : at + 1], last[:, at : at + 1] = start, ends
        ends = torch.where(start == at, at - 1, ends).clamp(min=0)
    return first, last


@register("holitom")
@dataclass
class HoliTom(VideoMethod):
    """Merge what stands still through a window of frames, rank the rest by attention, and cluster what was merged.

    The clip is cut into windows such that merging saves the most tokens. A place that stands still through its window
    becomes one token in the window's first frame, the mean over the window. The budget is then shared in proportion:
    each frame keeps of its other tokens those with the most [CLS] attention (or where the encoder has none, those that
    receive the most), and of the merged ones the centres of a density peak clustering, into which the others of their
    cluster go. A clip that merging alone brings below its budget keeps fewer tokens than `keep`; a still picture
    keeps its most attended tokens. The inner part, inside the LLM, is not part of this method.

    keep: fraction of a clip's tokens, or tokens per frame; 0.25 is this library's default, the paper's are 0.1 to 0.25.
    alike: cosine above which a place stands still, in [-1, 1]; 0.8 is that of the authors' code.
    own: weight of a cluster's centre in what it becomes, in [0, 1]; 0.6 is that of the authors' code.
    neighbours: how many nearest tokens a density counts, at least 1; 7 is that of the authors' code.

    Source: HoliTom, arXiv 2505.21334, and the authors' code. There each part's count is rounded by itself and ties are
    broken by noise; here the counts add up to the budget, and ties are broken by the order.
    """

    summary = "what stands still merged over windows of frames, the rest by attention, before the LLM"
    source = "HoliTom, arXiv 2505.21334 (outer part)"
    reads = frozenset({"cls", "features"})
    merges = True

    keep: float | int = 0.25
    alike: float = 0.8
    own: float = 0.6
    neighbours: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alike", self.alike, -1, 1)
        check_range("own", self.own, 0, 1)
        check_range("neighbours", self.neighbours, 1, integer=True)

    def score(self, tokens: VideoTokens) -> Tensor:
        assert tokens.cls is not None  # what ranks those that stay as they are
        return tokens.cls[:, :, -1]

    def choose(self, tokens: VideoTokens, budget: Tensor) -> tuple[Tensor, Tensor | None]:
        assert tokens.features is not None and tokens.cls is not None
        features, frames, n = tokens.features, tokens.frames, tokens.n
        until = still_until(features, self.alike)
        first, last = windows(until)
        through = until.gather(1, first.unsqueeze(-1).expand_as(until)) >= last.unsqueeze(-1)
        still = through & (last > first).unsqueeze(-1)
        heads = still & (first == torch.arange(frames, device=tokens.device)).unsqueeze(-1)
        sizes = torch.cat([heads.sum(-1), (~still).sum(-1)], dim=1)
        shares = share_out(sizes + 1e-9, budget.minimum(sizes.sum(-1)), 0, sizes)
        ranked = topk_mask(tokens.cls[:, :, -1].masked_fill(still, -torch.inf), shares[:, frames:])

        same = (first.unsqueeze(1) == first.unsqueeze(2)).float()
        means = (same / same.sum(-1, keepdim=True)) @ features.float().flatten(2)
        points, merged = means.view(-1, n, features.shape[-1]), heads.flatten(0, 1)
        most = min(n, tokens.most or n)
        distance = torch.cdist(points, points) * features.shape[-1] ** -0.5
        centers, real, member = density_peaks(
            distance, merged, shares[:, :frames].flatten(), most, neighbours=self.neighbours
        )
        center = torch.zeros_like(merged).scatter(1, centers, real)
        joins = merged & ~center
        gathered = cluster_means(points, member, joins, most)
        crowded = (member.unsqueeze(1) == torch.arange(most, device=member.device).unsqueeze(-1)) & joins.unsqueeze(1)
        at = centers.unsqueeze(-1).expand_as(gathered)
        own = points.gather(1, at)
        new = torch.where(crowded.any(-1, keepdim=True), self.own * own + (1 - self.own) * gathered, own)
        becomes = torch.where(center.unsqueeze(-1), points.scatter(1, at, new), features.flatten(0, 1))
        return ranked | center.view_as(ranked), becomes.view_as(features).to(features.dtype)
