"""Dense storage of ragged choices, and the rows of a forward pass that are still computed.

Every row keeps its own entries; shorter rows are filled on the left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Compaction:
    """Where the kept entries of a mask come from.

    source: (batch, heads, width) index into the masked dimension, ascending; where a row keeps fewer than `width`
    entries it starts with fillers, copies of dropped entries that must never be attended to.
    real: bool of the same shape, False at fillers. ragged: whether there is any filler. uneven: whether the heads of a
    row keep differently many, so that each has fillers of its own.
    """

    source: Tensor
    real: Tensor
    ragged: bool
    uneven: bool


def compact(mask: Tensor, present: Tensor) -> Compaction | None:
    """Gather the True entries of `mask`; None when no present entry would go.

    mask, present: bool (batch, heads, n). One device synchronisation.
    """
    counts = mask.sum(-1)
    lost = (present & ~mask).any()
    uneven = (counts != counts[:, :1]).any()
    low, high, any_lost, any_uneven = torch.stack(
        [counts.min(), counts.max(), lost.to(counts.dtype), uneven.to(counts.dtype)]
    ).tolist()
    if not any_lost:
        return None
    high = max(high, 1)
    # A stable sort of 0 / 1 puts the kept entries last, in their own order.
    source = mask.to(torch.uint8).argsort(dim=-1, stable=True)[..., -high:]
    return Compaction(source, mask.gather(-1, source), low < high, bool(any_uneven))


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


@dataclass(frozen=True)
class Lent:
    """The entries of a layer as later layers borrow them: what it sees itself, even if it is evicted meanwhile.

    positions: (batch, kv_heads | 1, slots) of the keys, None where none went. rows: (batch, width) which tokens of this
    pass are among them, None for all. slots: how many keys there are.
    """

    positions: Tensor | None
    rows: Tensor | None
    slots: int


def gather_rows(tensor: Tensor, source: Tensor) -> Tensor:
    """Rows of a (batch | 1, n, d) tensor, or of several streams of such, (streams, batch, n, d).

    source: (batch, width). Returns (batch, width, d), or the same of all streams.
    """
    if tensor.ndim == 4:
        return torch.stack([gather_rows(stream, source) for stream in tensor])
    batch, n, dim = tensor.shape
    # Whole rows of memory: an order of magnitude quicker than `gather` with an index for every number.
    first = torch.arange(0, batch * n, n, device=source.device).unsqueeze(1)
    return tensor.reshape(-1, dim).index_select(0, (first + source).flatten()).view(*source.shape, dim)


def add_to_rows(rows: Rows, hidden: Tensor, where: Tensor, features: Tensor) -> Tensor:
    """Hidden states of rows, (batch, rows, d), and what is added to some tokens.

    where: bool (batch, q), these tokens. features: (their number, d), theirs in order.
    """
    full = hidden.new_zeros(*where.shape, hidden.shape[-1])
    full[where.to(hidden.device)] = features.to(hidden)
    return hidden + gather_rows(full, rows.source.to(hidden.device))


def gather_entries(held: Tensor, source: Tensor) -> Tensor:
    """Entries of every head. held: (batch, heads, slots, d). source: (batch, heads | 1, width)."""
    source = source.expand(-1, held.shape[1], -1)
    return gather_rows(held.flatten(0, 1), source.flatten(0, 1)).unflatten(0, source.shape[:2])


def first_stream(hidden: Tensor) -> Tensor:
    """Hidden states (batch, rows, d), of several streams the first, which is the one that attends."""
    return hidden[0] if hidden.ndim == 4 else hidden


class Stream:
    """What comes in to the layers of one kind: the prompt's tokens, or image features.

    tokens: how many of each sample, before any went. rows: those that are still computed, None while all are.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.rows: Rows | None = None
        self._placed: tuple[Rows, int, Tensor] | None = None
        self._inverse: tuple[Rows, Tensor] | None = None

    @property
    def index(self) -> Tensor | None:
        """(batch, width) which tokens are still computed, -1 at fillers; None while all are."""
        return None if self.rows is None else self.rows.index

    def placed(self, start: int) -> Tensor | None:
        """(batch, 1, width) the positions of the tokens still computed behind `start` others, -1 at fillers; None while
        all are. The same tensor whenever the answer is the same."""
        if self.rows is None:
            return None
        if self._placed is None or self._placed[0] is not self.rows or self._placed[1] != start:
            index = self.rows.index
            self._placed = (self.rows, start, index.where(index < 0, index + start).unsqueeze(1))
        return self._placed[2]

    def narrow(self, keep: Tensor, valid: Tensor) -> Tensor | None:
        """Let only the tokens where `keep` go on. keep, valid: bool (batch, tokens); valid: no padding.

        Returns (batch, width): which of the rows that were computed so far go on; None where all do.
        """
        present = valid if self.rows is None else self.rows.real
        mask = keep if self.rows is None else keep.gather(1, self.rows.source) & present
        choice = compact(mask.unsqueeze(1), present.unsqueeze(1))
        if choice is None:
            return None
        source = choice.source[:, 0]
        kept = source if self.rows is None else self.rows.source.gather(1, source)
        self.rows = Rows(kept, choice.real[:, 0], choice.ragged)
        return source

    def alive(self, valid: Tensor) -> Tensor:
        """bool (batch, tokens): what is still computed. valid: of the same shape, no padding."""
        if self.rows is None:
            return valid
        alive = torch.zeros(valid.shape[0], self.tokens + 1, dtype=torch.bool, device=valid.device)
        return alive.scatter(1, torch.where(self.rows.real, self.rows.source, self.tokens), True)[:, :-1]

    def rows_of(self, positions: Tensor, samples: Tensor) -> Tensor:
        """The row of each token among those still computed, -1 where it is none of them; -1 leads to -1.

        positions: (n, ...) of tokens. samples: (n,) which sample each line of `positions` belongs to.
        """
        if self.rows is None:
            return positions
        if self._inverse is None or self._inverse[0] is not self.rows:
            batch, width = self.rows.source.shape
            inverse = torch.full((batch, self.tokens + 2), -1, device=positions.device)
            where = torch.where(self.rows.real, self.rows.source + 1, self.tokens + 1)
            inverse = inverse.scatter(1, where, torch.arange(width, device=positions.device).expand_as(where))
            inverse[:, 0] = -1
            self._inverse = (self.rows, inverse)
        inverse = self._inverse[1]
        return inverse[samples.view(-1, *[1] * (positions.ndim - 1)), positions + 1]

    def spread(self, hidden: Tensor) -> Tensor:
        """From the rows still computed back to all tokens, zeros where some went: (batch, tokens, d)."""
        if self.rows is None:
            return hidden
        full = hidden.new_zeros(hidden.shape[0], self.tokens, hidden.shape[-1])
        source = self.rows.source.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        real = hidden.masked_fill(~self.rows.real.unsqueeze(-1), 0) if self.rows.ragged else hidden
        return full.scatter(1, source, real)
