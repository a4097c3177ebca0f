"""FastVID: frames in segments; salient tokens stay, and anchors of every fourth frame gather the rest of a segment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import register
from .base import VideoMethod
from .budgets import check_range, share_out, topk_mask
from .clustering import peak_scores
from .tokens import VideoTokens

NEIGHBOURS = 4  # of a token, that its density counts


def segments(features: Tensor, most_alike: float, fewest: int) -> Tensor:
    """The segment of each frame, numbered from 0: int64 (clips, frames).

    A segment ends where two frames' mean tokens have a cosine below `most_alike`, and at the `fewest` - 1 lowest ones.
    features: (clips, frames, n, hidden).
    """
    means = normalize(features.float().mean(2), dim=-1)
    alike = (means[:, 1:] * means[:, :-1]).sum(-1)
    cuts = (alike < most_alike) | topk_mask(-alike, fewest - 1)
    return torch.nn.functional.pad(cuts.cumsum(-1), (1, 0))


def anchor_budgets(segment: Tensor, context: Tensor, every: Tensor) -> Tensor:
    """How many anchor tokens each frame has: (clips, frames), 0 in frames without any.

    The last frame of a segment has some, and each `every`-th before it; they share what the segment's frames may keep.
    segment, context: (clips, frames), the segment and the anchor tokens' budget of each frame. every: (clips,).
    """
    frame = torch.arange(segment.shape[1], device=segment.device)
    same = segment.unsqueeze(1) == segment.unsqueeze(2)
    behind = (same & (frame > frame.unsqueeze(-1))).sum(-1)
    anchor = behind % every.unsqueeze(-1) == 0
    anchors = same & anchor.unsqueeze(1)
    count, rank = anchors.sum(-1), (anchors & (frame < frame.unsqueeze(-1))).sum(-1)
    total = (same * context.unsqueeze(1)).sum(-1)
    return (total // count + (rank < total % count)) * anchor


def gather_rest(
    features: Tensor, segment: Tensor, salient: Tensor, target: Tensor, slots: int, own: float, chunk: int = 1 << 24
) -> Tensor:
    """What the targets become when every token that is not salient joins the likest target of each anchor frame.

    A target with c such tokens, itself among them, becomes w * itself + (1 - w) * their mean, w = max(own, 1 / (c+1)).

    features: (clips, frames, n, hidden). segment: (clips, frames); tokens join anchors of their own segment only.
    salient, target: bool (clips, frames, n). slots: an upper bound of the targets of a clip. Of equal cosines that of
    the earlier target counts. Returns a tensor like `features`, in which the targets are replaced.
    """
    clips, frames, n, hidden = features.shape
    flat, goes = features.flatten(1, 2), ~salient.flatten(1)
    at = target.flatten(1).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :slots]
    real = target.flatten(1).gather(1, at)
    frame = torch.where(real, at // n, frames)  # ascending: the anchor frame of each target
    starts = torch.searchsorted(frame, frame)
    source = segment.repeat_interleave(n, dim=1)
    where = segment.gather(1, frame.clamp(max=frames - 1))
    points = flat.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden)).float()
    directions = normalize(points, dim=-1).transpose(1, 2)
    total, count = torch.zeros_like(points), points.new_zeros(clips, at.shape[1], 1)
    step = max(1, chunk // (clips * max(at.shape[1], hidden)))
    for start in range(0, flat.shape[1], step):
        part = slice(start, start + step)
        tokens = flat[:, part].float()
        open_to = goes[:, part].unsqueeze(2) & real.unsqueeze(1)
        open_to &= source[:, part].unsqueeze(2) == where.unsqueeze(1)
        alike = (normalize(tokens, dim=-1) @ directions).masked_fill(~open_to, -torch.inf)
        index = frame.unsqueeze(1).expand_as(alike)
        best = alike.new_full((*alike.shape[:2], frames + 1), -torch.inf).scatter_reduce(2, index, alike, "amax")
        likest = (alike == best.gather(2, index)) & open_to
        # Of equals in an anchor frame the first.
        seen = likest.cumsum(-1)
        before = (seen - likest.long()).gather(2, starts.unsqueeze(1).expand_as(seen))
        joins = (likest & (seen - before == 1)).float().transpose(1, 2)
        total += joins @ tokens
        count += joins.sum(-1, keepdim=True)
    weight = (1 / (count + 1)).clamp(min=own)
    new = torch.where(count > 0, weight * points + (1 - weight) * total / count.clamp(min=1), points)
    return flat.scatter(1, at.unsqueeze(-1).expand_as(new), new.to(flat.dtype)).view_as(features)


@register("fastvid")
@dataclass
class FastVID(VideoMethod):
    """Keep the tokens of each frame that [CLS] looks at, and anchors that gather the others of their segment.

    A clip is cut into segments where neighbouring frames differ. Of each frame's budget a share 1 - `context` goes to
    the tokens with the most [CLS] attention. The rest of a segment's budget goes to anchor frames, the last of the
    segment and every `every`-th before it: there the tokens that are dense among their neighbours and far from denser
    ones take in the likest tokens of the whole segment, by cosine. Where the encoder has no [CLS], the attention that
    each token receives takes its place. A still picture is one segment with one anchor frame.

    keep: fraction of a clip's tokens, or tokens per frame; 0.25 is this library's default, the paper goes down to 0.1.
    context: share of the budget that goes to anchors, in [0, 1]; 0.4 is the authors'.
    segments: the fewest segments of a clip that has so many frames, at least 1; 8 is the authors', for 32 frames.
    alike: cosine of two frames' mean tokens below which a segment ends, in [-1, 1]; 0.9 is the authors'.
    every: of how many frames of a segment one is an anchor frame, at least 1; 4 is the authors'.
    own: the least weight of an anchor in what it becomes, in [0, 1]; 0.6 is the authors'.

    Source: FastVID, arXiv 2503.11187, and the authors' code. There frames are compared by the encoder's pooled output,
    ties are broken by noise, and the counts are rounded down; here by their mean token, by the order, and the counts
    add up to the budget. Where an anchor frame has no room for its share, anchor frames stand closer.
    """

    summary = "the most attended tokens of each frame, and anchors that gather the rest of a segment, before the LLM"
    source = "FastVID, arXiv 2503.11187"
    reads = frozenset({"cls", "features"})
    merges = True

    keep: float | int = 0.25
    context: float = 0.4
    segments: int = 8
    alike: float = 0.9
    every: int = 4
    own: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("context", self.context, 0, 1)
        check_range("segments", self.segments, 1, integer=True)
        check_range("alike", self.alike, -1, 1)
        check_range("every", self.every, 1, integer=True)
        check_range("own", self.own, 0, 1)

    def score(self, tokens: VideoTokens) -> Tensor:
        assert tokens.cls is not None  # what ranks those that stay as they are
        return tokens.cls[:, :, -1]

    def choose(self, tokens: VideoTokens, budget: Tensor) -> tuple[Tensor, Tensor | None]:
        assert tokens.features is not None and tokens.cls is not None
        features, (clips, frames, n) = tokens.features, (tokens.clips, tokens.frames, tokens.n)
        segment = segments(features, self.alike, self.segments)
        even = torch.ones(clips, frames, device=tokens.device)
        each = share_out(even, budget, 1, n)
        context = (self.context * each.double() + 1e-6).floor().long()
        salient = topk_mask(tokens.cls[:, :, -1], each - context)
        room = n - (each - context).amax(-1)
        every = (room // context.amax(-1).clamp(min=1)).clamp(1, self.every)
        points = features.flatten(0, 1).float()
        distance = torch.cdist(points, points) * features.shape[-1] ** -0.5
        others = ~salient.flatten(0, 1)
        neighbours = others.sum(-1).clamp(max=NEIGHBOURS)
        score = peak_scores(distance, others, neighbours, min(NEIGHBOURS, n)).view(clips, frames, n)
        target = topk_mask(score, anchor_budgets(segment, context, every))
        slots = max(1, int(self.context * (tokens.most or frames * n) + 1e-6))
        return salient | target, gather_rest(features, segment, salient, target, min(slots, frames * n), self.own)
