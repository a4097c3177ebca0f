"""VisionZip: dominant tokens stay, contextual tokens gather what is left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import register
from .base import EncoderMethod
from .budgets import check_range, topk_mask
from .tokens import EncoderTokens


def dominant_and_targets(scores: Tensor, budget: Tensor, contextual: float) -> tuple[Tensor, Tensor]:
    """Split `budget` into the tokens with the highest scores and targets at an even stride among the others.

    scores: (tiles, n); budget: (tiles,); contextual: the targets' share of it. Returns two bool (tiles, n) without
    a common token, `floor(contextual * budget)` of them targets, together exactly `budget`.
    """
    targets = (contextual * budget.double() + 1e-6).floor().long()
    dominant = topk_mask(scores, budget - targets)
    rank = (~dominant).cumsum(-1) - 1
    stride = ((~dominant).sum(-1) // targets.clamp(min=1)).clamp(min=1).unsqueeze(-1)
    chosen = (rank % stride == 0) & (rank // stride < targets.unsqueeze(-1))
    return dominant, chosen & ~dominant


def contextual_states(
    states: Tensor, keys: Tensor, dominant: Tensor, target: Tensor, slots: int, chunk_elements: int = 1 << 24
) -> Tensor:
    """Add to each target's state the mean state of the tokens whose keys are most similar to its own.

    states: (tiles, n, width); keys: (tiles, n, d); dominant, target: bool (tiles, n), at most `slots` targets a
    tile. Tokens that are neither go to the target of highest cosine, the earlier one on a tie. Returns
    float32 (tiles, slots, width), targets in raster order; what stands behind the last has no meaning.
    """
    tiles, n = target.shape
    index = torch.arange(n, device=target.device).expand(tiles, n)
    slot = (target.cumsum(-1) - 1).where(target, slots)  # one more slot takes those that are no target
    at = index.new_zeros(tiles, slots + 1).scatter(1, slot, index)[:, :slots].unsqueeze(-1)
    empty = index.new_ones(slots).cumsum(0) > target.sum(-1, keepdim=True)
    directions = normalize(keys.float(), dim=-1)
    centers = directions.gather(1, at.expand(-1, -1, keys.shape[-1])).transpose(1, 2)
    total = torch.zeros(tiles, slots, states.shape[-1], dtype=torch.float32, device=states.device)
    count = torch.zeros(tiles, slots, 1, dtype=torch.float32, device=states.device)
    step = max(1, chunk_elements // (tiles * max(slots, states.shape[-1])))
    for start in range(0, n, step):
        part = slice(start, start + step)
        nearest = (directions[:, part] @ centers).masked_fill(empty.unsqueeze(1), -torch.inf).argmax(-1)
        goes = ~(dominant | target)[:, part]
        # A product, because scattered additions are not repeatable on every device.
        joins = (nearest.where(goes, -1).unsqueeze(1) == torch.arange(slots, device=at.device).unsqueeze(-1)).float()
        total += joins @ states[:, part].float()
        count += joins.sum(-1, keepdim=True)
    return states.gather(1, at.expand(-1, -1, states.shape[-1])).float() + total / count.clamp(min=1)


@register("visionzip")
@dataclass
class VisionZip(EncoderMethod):
    """Keep the tokens that [CLS] looks at, and let some of the others carry the mean of those that leave.

    Dominant tokens have the highest [CLS] attention of the penultimate encoder layer, mean over heads (the
    authors sum, which ranks alike). Of the others every m-th is a contextual token: it becomes itself plus the
    mean of the dropped tokens whose keys (mean over heads) are most similar to its own, in front of the projector,
    which then runs on it again. Where the projector joins patches, the sum is taken behind it; where the encoder has
    no [CLS], the attention that each patch receives takes its place. Tiled models: every tile is worked on
    separately with its share of the image's budget.

    keep: fraction of each image's tokens, or tokens per image; 0.25 is this library's default, that of the other
        methods before the LLM; the paper's settings are 192, 128 and 64 of 576.
    contextual: share of the budget for contextual tokens, in [0, 1]; 10/64 is that of all the paper's settings
        (54 + 10, 108 + 20, 162 + 30).

    Source: VisionZip, arXiv 2412.04467, and the authors' code. There the [CLS] token itself is handed on as one of
    the dominant tokens and contextual tokens are appended behind them; here a patch takes the place of [CLS], and all
    stand at their original positions.
    """

    summary = "tokens with the most [CLS] attention, and contextual tokens merged from the rest, before the LLM"
    source = "VisionZip, arXiv 2412.04467"
    reads = frozenset({"cls", "keys", "states", "features"})

    keep: float | int = 0.25
    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("contextual", self.contextual, 0, 1)

    def score(self, tokens: EncoderTokens) -> Tensor:
        assert tokens.cls is not None  # what ranks the dominant ones
        return tokens.cls[:, -1]

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        assert tokens.cls is not None
        dominant, target = dominant_and_targets(tokens.cls[:, -1], budget, self.contextual)
        return dominant | target

    def merge(self, tokens: EncoderTokens, keep: Tensor) -> Tensor | None:
        assert tokens.cls is not None and tokens.keys is not None
        assert tokens.states is not None and tokens.features is not None
        dominant, target = dominant_and_targets(tokens.cls[:, -1], keep.sum(-1), self.contextual)
        slots = max(1, int(self.contextual * (tokens.most or keep.shape[1]) + 1e-6))
        states = contextual_states(tokens.states, tokens.keys, dominant, target, slots)
        features = tokens.project(states.to(tokens.states.dtype))
        at = (target.cumsum(-1) - 1).clamp(0, slots - 1).unsqueeze(-1).expand_as(tokens.features)
        return features.gather(1, at).where(target.unsqueeze(-1), tokens.features)
