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
    def woven(self) -> bool:
        """Whether tokens go from between structure, such as breaks behind the rows of a picture.

        How many stay between two breaks is known only once the picture is encoded. All that is left of `full` stands in
        the prompt as image tokens then, and the worker embeds the structure, too.
        """
        # The run of tokens without structure between them that each token is in.
        run = (~self.embeds).cumsum(0)[self.embeds]
        return self.prunes and any(len(run[tile.index].unique()) > 1 for tile in self.layout.tiles)

    @property
    def placeholders(self) -> Tensor:
        """(s,) the ids that stand for the picture in the pruned prompt."""
        left = self.full[self.remaining]
        return self.full[self.embeds][:1].expand_as(left) if self.woven else left

    def places(self, index: Tensor) -> Tensor:
        """(e,) which of `full` the worker embeds. index: of the tokens that stay."""
        there = ~self.embeds if self.woven else torch.zeros_like(self.embeds)
        there[self.embeds.nonzero()[index, 0]] = True
        return there.nonzero()[:, 0]

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

    def check(self, model_type: str, m_rope: bool) -> None:
        """Raise ValueError where the placeholders and the layout do not fit together."""
        if int(self.embeds.sum()) != self.layout.tokens:
            raise ValueError(
                f"vLLM writes {int(self.embeds.sum())} tokens for a picture of a {model_type} model, and foveate finds "
                f"{self.layout.tokens} in it: leave out further mm_processor_kwargs, or foveate"
            )
        if m_rope and self.woven:
            raise ValueError(
                f"{model_type} models have structure amid the tokens of a picture, which has no row and column: run "
                "this model in transformers with foveate.prune"
            )

    def offsets(self, index: Tensor, m_rope: bool) -> Tensor:
        """(coordinates, e) the position of what the worker embeds, counted from that where the picture begins.

        Along one coordinate the place among `full`; under M-RoPE the row and column, the picture's time being 0.
        index: of the tokens that stay.
        """
        return self.layout.cells[index, 1:].T if m_rope else self.places(index)[None]

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
