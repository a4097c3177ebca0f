"""By what numbers methods ranked image tokens: laid out over the prompt, for the report."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Scores = dict[str, dict[int, Tensor]]
"""By method, and by the decoder layer it chose at: float32 (batch, heads | 1, length), NaN where nothing was asked."""


def laid_out(scores: Tensor, positions: Tensor, row: Tensor, shape: tuple[int, int]) -> Tensor:
    """The scores of several images at their logical positions: float32 (batch, heads | 1, length), NaN elsewhere.

    scores: (groups, n), or (groups, heads, ..., n); parts of one score in between count together. positions: (groups,
    n), -1 at padding. row: (groups,) the sample of each. shape: batch and length.
    """
    scores = scores.float().detach()
    scores = scores.unsqueeze(1) if scores.ndim == 2 else scores.flatten(2, -2).sum(2) if scores.ndim > 3 else scores
    (batch, length), heads = shape, scores.shape[1]
    out = scores.new_full((batch, heads, length + 1), torch.nan)
    # Padding points one past the end.
    at = torch.where(positions < 0, length, positions).unsqueeze(1).expand_as(scores)
    out[row[:, None, None].expand_as(at), torch.arange(heads, device=out.device)[:, None].expand_as(at), at] = scores
    return out[..., :-1]


def of_images(
    scores: Sequence[Tensor | None], places: Sequence[tuple[int, Tensor]], shape: tuple[int, int]
) -> Tensor | None:
    """The same of images that were scored one by one; None where none was.

    scores: for each image (tokens,), NaN where nothing was asked. places: its sample and the positions of its tokens.
    """
    known = [(each, place) for each, place in zip(scores, places, strict=True) if each is not None]
    if not known:
        return None
    out = torch.full((shape[0], 1, shape[1]), torch.nan, dtype=torch.float32, device=known[0][1][1].device)
    for each, (row, at) in known:
        out[row, 0, at] = each.float().to(out.device)
    return out
