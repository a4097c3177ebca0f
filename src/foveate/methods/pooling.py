"""Pooling: a baseline that keeps the mean of every cell of an even split of the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import register
from .base import EncoderMethod
from .tokens import EncoderTokens


def spread(length: int, parts: Tensor) -> Tensor:
    """12 x the squared distances of `length` places to the middles of the `parts` even runs they are cut into."""
    size, longer = length // parts, length % parts
    return (parts - longer) * size * (size**2 - 1) + longer * (size + 1) * ((size + 1) ** 2 - 1)


def bands(budget: Tensor, grid: tuple[int, int]) -> Tensor:
    """Into how many bands of rows to cut the grid, so that tokens lie closest to the middles of their cells.

    budget: (tiles,) cells, in [1, rows * columns]. Returns int64 (tiles,), the fewest on a tie.
    """
    rows, columns = grid
    count, cells = torch.arange(1, rows + 1, device=budget.device), budget.unsqueeze(-1)
    fewer, extra = (cells // count).clamp(min=1), cells % count
    across = (count - extra) * spread(columns, fewer) + extra * spread(columns, fewer + 1)
    cost = columns * spread(rows, count) + across * (rows / count)
    return cost.masked_fill((count > cells) | (count * columns < cells), torch.inf).argmin(-1) + 1


def part_of(places: int, parts: Tensor) -> tuple[Tensor, Tensor]:
    """Cut `places` in a row into even parts. parts: (...). Returns int64 and bool (..., places): each place's part,
    and whether it is the middle of it (of two, the earlier)."""
    parts = parts.unsqueeze(-1)
    place = torch.arange(places, device=parts.device)
    part = place * parts // places
    first, behind = -(-part * places // parts), -(-(part + 1) * places // parts)
    return part, place == (first + behind - 1) // 2


def cells(budget: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Cut each tile's grid into exactly `budget` cells: even bands of rows, each of them into even runs of columns.

    budget: (tiles,), in [1, rows * columns]. Returns (tiles, rows) the band of each row, (tiles, rows, columns) the
    run of each token in its row's band, and bool (tiles, rows, columns), True for the token amid each cell.
    """
    count = bands(budget, grid).unsqueeze(-1)
    band, amid_rows = part_of(grid[0], count.squeeze(-1))
    cells = budget.unsqueeze(-1)
    run, amid_columns = part_of(grid[1], (band + 1) * cells // count - band * cells // count)
    return band, run, amid_columns & amid_rows.unsqueeze(-1)


def mean_of_equals(values: Tensor, part: Tensor) -> Tensor:
    """Replace values by the mean over the places of the same part. values: (..., places, d); part: (..., places)."""
    same = (part.unsqueeze(-1) == part.unsqueeze(-2)).to(values.dtype)
    return same @ values / same.sum(-1, keepdim=True)


@register("pooling")
@dataclass
class Pooling(EncoderMethod):
    """Cut the picture into as many even cells as tokens may stay, and keep the mean of each at its central token.

    The grid is cut into bands of rows and each band into runs of columns; how many bands is chosen so that the tokens
    lie closest to the middles of their cells. Where the budget allows whole cells of equal size, as 144 of
    24 x 24, this is plain average pooling. Tiled models: every tile is cut with its share of the image's budget.

    keep: fraction of each image's tokens, or tokens per image; 0.25 is this library's default.

    Source: a baseline; its strength is documented in arXiv 2502.11501. The cut for budgets that do not divide the
    grid, and the place of the mean, are this library's choice.
    """

    summary = "baseline: the mean of each cell of an even split of the picture, before the LLM"
    source = "baseline (arXiv 2502.11501)"
    reads = frozenset({"features"})

    keep: float | int = 0.25

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        *_, amid = cells(budget, tokens.grid)
        return amid.flatten(1)

    def merge(self, tokens: EncoderTokens, keep: Tensor) -> Tensor | None:
        assert tokens.features is not None
        band, run, _ = cells(keep.sum(-1), tokens.grid)
        # A cell is a rectangle: its mean is the mean over its rows of the means over its columns.
        values = tokens.features.float().unflatten(1, tokens.grid)
        values = mean_of_equals(values, run)
        values = mean_of_equals(values.flatten(2), band).view_as(values)
        return values.flatten(1, 2).to(tokens.features.dtype)
