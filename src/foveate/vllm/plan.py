"""What the front end tells the worker about one picture, in one tensor. Needs no vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..layout import ImageLayout, Tile
from ..methods.selection import kept_tokens, tile_budgets


@dataclass(frozen=True)
class Plan:
    """One picture of a prompt, and how many of its tokens stay.

    layout: its patches count from 0. patches: how many the encoder makes of it; padding adds to those of the layout.
    budget: tokens that may stay. full: (m,) the ids that stand for the picture in the unpruned prompt. embeds: bool
    (m,), where among these its tokens go; the rest is structure.
    """

    layout: ImageLayout
    patches: int
    budget: int
    full: Tensor
    embeds: Tensor

    @property
    def kept(self) -> int:
        """Tokens that stay."""
        return kept_tokens(self.layout, self.budget)

    @property
    def prunes(self) -> bool:
        """Whether any token goes."""
        return self.kept < self.layout.tokens

    @cached_property
    def remaining(self) -> Tensor:
        """(s,) which of `full` stand in the pruned prompt: as many of each tile's as may stay, the first for all.

        Which tokens of a tile stay is not known before it is encoded; how many is.
        """
        stays = torch.ones(self.layout.tokens, dtype=torch.bool)
        for tile, budget in zip(self.layout.tiles, tile_budgets(self.layout, self.budget), strict=True):
            stays[tile.index.sort().values[budget:]] = False
        there = torch.ones(len(self.full), dtype=torch.bool)
        there[self.embeds] = stays
        return there.nonzero()[:, 0]

    def check(self, model_type: str) -> None:
        """Raise ValueError where the placeholders and the layout do not fit together.

        How many tokens of a tile stay is known, but not how many of a part of it: no structure may stand inside one.
        """
        if int(self.embeds.sum()) != self.layout.tokens:
            raise ValueError(
                f"vLLM writes {int(self.embeds.sum())} tokens for a picture of a {model_type} model, and foveate finds "
                f"{self.layout.tokens} in it: leave out further mm_processor_kwargs, or foveate"
            )
        # The run of tokens without structure between them that each token is in.
        run = torch.cat([torch.zeros(1, dtype=torch.long), (~self.embeds).cumsum(0)[:-1]])[self.embeds]
        if any(len(run[tile.index].unique()) > 1 for tile in self.layout.tiles):
            raise ValueError(
                f"{model_type} models have structure amid the tokens of a picture, and how many stay between two such "
                "is not known in advance: run this model in transformers with foveate.prune"
            )

    def offsets(self, m_rope: bool) -> Tensor:
        """(coordinates, tokens) the position of each token, counted from that where the picture begins.

        Along one coordinate the place among `full`; under M-RoPE the row and column, the picture's time being 0.
        """
        if m_rope:
            return self.layout.cells[:, 1:].T
        return self.embeds.nonzero().T

    def tensor(self) -> Tensor:
        """All of it as int64 numbers in a row."""
        tiles = [
            torch.cat(
                [
                    torch.tensor([*tile.grid, tile.frame, tile.patches.numel() // len(tile.index)]),
                    tile.index,
                    tile.patches.flatten(),
                ]
            )
            for tile in self.layout.tiles
        ]
        head = [self.patches, self.budget, len(self.full), self.layout.tokens, len(tiles)]
        return torch.cat([torch.tensor(head), self.full, self.embeds.long(), *tiles])

    @classmethod
    def read(cls, numbers: Tensor) -> Plan:
        """What `tensor` wrote; where tiles lie in the picture is not part of it."""
        patches, budget, length, tokens, count = numbers[:5].tolist()
        full, embeds, rest = numbers[5:].split([length, length, len(numbers) - 5 - 2 * length])
        tiles = []
        for _ in range(count):
            rows, columns, frame, joined = rest[:4].tolist()
            n = rows * columns
            index, of, rest = rest[4:].split([n, n * joined, len(rest) - 4 - n - n * joined])
            tiles.append(Tile(index, (rows, columns), of.view(n, joined) if joined > 1 else of, frame=frame))
        return cls(ImageLayout(tokens, tuple(tiles)), patches, budget, full, embeds.bool())


def packed(plans: list[Plan]) -> list[ImageLayout]:
    """The layouts of pictures that are encoded together, their patches counted through."""
    layouts, first = [], 0
    for plan in plans:
        tiles = (Tile(t.index, t.grid, t.patches + first, t.box, t.frame) for t in plan.layout.tiles)
        layouts.append(ImageLayout(plan.layout.tokens, tuple(tiles)))
        first += plan.patches
    return layouts
