"""Choosing tokens one after the other, each the best beside those that were chosen: what several methods share.

All tiles choose at once, on their device; no step waits for what an earlier one chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

LIMIT = 1 << 27
"""Elements of the largest table that is held: of one tile of 11,585 tokens, or of several smaller ones."""


def one_by_one(scores: Tensor, steps: int, after: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Tokens in the order in which they are the best: the one with the highest score, of equals the earlier.

    scores: (tiles, n), finite, before the first choice. after: from a choice, (tiles,), and its number, from 0, to the
    next scores; what stands there for chosen tokens has no meaning. Returns int64 (tiles, steps), no token twice.
    """
    taken = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    picks: list[Tensor] = []
    for step in range(steps):
        pick = scores.masked_fill(taken, -torch.inf).argmax(-1)
        picks.append(pick)
        if step + 1 < steps:
            taken.scatter_(1, pick.unsqueeze(1), True)
            scores = after(pick, step)
    return torch.stack(picks, 1)


def first_of(order: Tensor, budget: Tensor, n: int) -> Tensor:
    """The first `budget` of each tile. order: (tiles, steps); budget: (tiles,). Returns bool (tiles, n)."""
    chosen = torch.arange(order.shape[1], device=order.device) < budget.unsqueeze(-1)
    return torch.zeros(len(order), n, dtype=torch.bool, device=order.device).scatter(1, order, chosen)


def earliness(order: Tensor, n: int) -> Tensor:
    """How early each token is picked: the first n, the last 1, 0 where it never is. order: (tiles, steps). Float32
    (tiles, n)."""
    counts = torch.arange(n, n - order.shape[1], -1, dtype=torch.float32, device=order.device)
    return counts.new_zeros(len(order), n).scatter(1, order, counts.expand_as(order))


class Cosines:
    """Cosines of the tokens of a tile with each other, for all tiles.

    features: (tiles, n, hidden). limit: of the elements of a table; where all n x n of the tiles do not fit, each row
    is worked out when it is asked for.
    """

    def __init__(self, features: Tensor, limit: int = LIMIT) -> None:
        self.directions = normalize(features.float(), dim=-1)
        tiles, n, _ = features.shape
        self._rows = max(1, limit // (tiles * n))
        self._tile = torch.arange(tiles, device=features.device)
        self._table = self.directions @ self.directions.transpose(1, 2) if self._rows >= n else None

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """All rows, (tiles, rows, n) at a time, with the number of the first; a table that is held, as it is held."""
        if self._table is not None:
            yield 0, self._table
            return
        for start in range(0, self.directions.shape[1], self._rows):
            yield start, self.directions[:, start : start + self._rows] @ self.directions.transpose(1, 2)

    def row(self, pick: Tensor) -> Tensor:
        """With one token of each tile. pick: (tiles,). Returns (tiles, n)."""
        if self._table is not None:
            return self._table[self._tile, pick]
        return (self.directions @ self.directions[self._tile, pick].unsqueeze(-1)).squeeze(-1)


def covering_first(table: Tensor, value: Tensor, steps: int, room: int | None = None) -> Tensor:
    """Tokens in the order in which each adds most to what is covered.

    With `best` the largest entry of each row among the tokens chosen so far, 0 at first, a token j adds
    `value_j * sum over rows of max(0, table_ij - best_i)`; of equals the earlier.

    table: (tiles, rows, n), how much token j covers of row i. value: (tiles, n), none negative. steps: in [1, n].
    room: what a choice adds to rows is subtracted from the gains of the others in `room * rows / k` of the rows at its
    k-th step, about as many as change; None for as many as do change, which only the device knows. Where room proves
    too little, all is done again with eight times as much; that is asked once, at the end. Returns int64 (tiles,
    steps).
    """
    if room is None and table.device.type != "cpu":
        room = 4
    order, behind = _cover(table, value, steps, room)
    while room is not None and room < steps and bool(behind):
        room *= 8
        order, behind = _cover(table, value, steps, room)
    return order


def _cover(table: Tensor, value: Tensor, steps: int, room: int | None) -> tuple[Tensor, Tensor]:
    """An order, and whether any gain was out of date when it was read."""
    tiles, rows, n = table.shape
    chunk = max(1, (1 << 24) // (tiles * n))
    lines, first = table.flatten(0, 1), torch.arange(0, tiles * rows, rows, device=table.device).unsqueeze(1)
    tile = torch.arange(tiles, device=table.device)
    best = table.new_zeros(tiles, rows)
    counted = best.clone()  # the best that the gains know of
    # Sums of small differences: float64, so that what is left after many steps is no rounding.
    gains = torch.zeros(tiles, n, dtype=torch.float64, device=table.device)
    for part in table.split(chunk, dim=1):
        gains += part.clamp(min=0).sum(1)
    behind = torch.zeros((), dtype=torch.bool, device=table.device)

    def after(pick: Tensor, step: int) -> Tensor:
        nonlocal best, behind
        best = torch.maximum(best, table[tile, :, pick])
        risen = best - counted
        width = int((risen > 0).sum(1).amax()) if room is None else min(rows, room * rows // (step + 1) + 32)
        for at in risen.topk(width, dim=1, sorted=False).indices.split(chunk, dim=1) if width else ():
            old, new = counted.gather(1, at), best.gather(1, at)
            covers = lines.index_select(0, (first + at).flatten()).view(tiles, -1, n)
            gains.sub_(covers.clamp_(old.unsqueeze(2), new.unsqueeze(2)).sub_(old.unsqueeze(2)).sum(1))
            counted.scatter_(1, at, new)
        behind = behind | (best > counted).any()
        return gains * value

    return one_by_one(gains * value, steps, after), behind
