"""Dense storage of ragged choices: every row keeps its own entries, shorter rows are filled on the left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Compaction:
    """Where the kept entries of a mask come from.

    source: (batch, heads, width) index into the masked dimension, ascending; where a row keeps fewer than `width`
    entries it starts with fillers, copies of dropped entries that must never be attended to.
    real: bool of the same shape, False at fillers. ragged: whether there is any filler.
    """

    source: Tensor
    real: Tensor
    ragged: bool


def compact(mask: Tensor, present: Tensor) -> Compaction | None:
    """Gather the True entries of `mask`; None when no present entry would go.

    mask, present: bool (batch, heads, n). One device synchronisation.

    Raises:
        ValueError: when the heads of a row keep different numbers of entries, which no dense tensor can hold.
    """
    counts = mask.sum(-1)
    lost = (present & ~mask).any()
    uneven = (counts != counts[:, :1]).any()
    low, high, any_lost, any_uneven = torch.stack(
        [counts.min(), counts.max(), lost.to(counts.dtype), uneven.to(counts.dtype)]
    ).tolist()
    if any_uneven:
        raise ValueError("every head of a layer must keep equally many entries of a sample")
    if not any_lost:
        return None
    high = max(high, 1)
    # A stable sort of 0 / 1 puts the kept entries last, in their own order.
    source = mask.to(torch.uint8).argsort(dim=-1, stable=True)[..., -high:]
    return Compaction(source, mask.gather(-1, source), low < high)


@dataclass(frozen=True)
class Rows:
    """The surviving rows of a forward pass: a compaction shared by all heads.

    source: (batch, width) index into the forward's tokens (or image features). real: bool (batch, width), False at
    fillers. ragged: whether there is any filler.
    """

    source: Tensor
    real: Tensor
    ragged: bool

    @property
    def index(self) -> Tensor:
        """(batch, width) like `source`, -1 at fillers."""
        return torch.where(self.real, self.source, -1)


def gather_rows(tensor: Tensor, source: Tensor) -> Tensor:
    """Rows of a (batch | 1, n, d) tensor. source: (batch, width). Returns (batch, width, d)."""
    tensor = tensor.expand(source.shape[0], -1, -1)
    return tensor.gather(1, source.unsqueeze(-1).expand(-1, -1, tensor.shape[-1]))
