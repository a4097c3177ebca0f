"""The layout of an image or clip: which tokens it has in the prompt, where they lie, which frame they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def grid_boxes(rows: int, columns: int) -> list[Box]:
    """The boxes of a picture cut into rows x columns, row by row."""
    return [(x / columns, y / rows, (x + 1) / columns, (y + 1) / rows) for y in range(rows) for x in range(columns)]


def joined(rows: int, columns: int, factor: int) -> Tensor:
    """(n, factor ** 2) the patches of a picture that join into each token where factor x factor do.

    Patches and tokens in raster order. What is left over at the right and lower edge joins no token.
    """
    high, wide = rows // factor, columns // factor
    patches = torch.arange(rows * columns).view(rows, columns)[: high * factor, : wide * factor]
    return patches.reshape(high, factor, wide, factor).transpose(1, 2).reshape(-1, factor**2)


@dataclass(frozen=True)
class Tile:
    """A rectangle of image tokens that the vision encoder saw as one picture.

    index: (n,) which of the image's tokens, in raster order. grid: (rows, columns), rows * columns = n.
    patches: (n,) which of the encoder's patches, counted over all pictures, each token is made of; (n, k) where k join.
    box: (left, top, right, bottom) of the tile as fractions of the picture, None where nobody says where it lies.
    frame: of a clip; 0 for a picture.
    """

    index: Tensor
    grid: tuple[int, int]
    patches: Tensor
    box: Box | None = WHOLE
    frame: int = 0

    def centers(self) -> Tensor:
        """(n, 2) where each token lies in the picture, (down, right) in [0, 1]; in its tile, where that is unknown."""
        left, top, right, bottom = self.box or WHOLE
        rows, columns = self.grid
        down = top + (torch.arange(rows) + 0.5) / rows * (bottom - top)
        across = left + (torch.arange(columns) + 0.5) / columns * (right - left)
        return torch.cartesian_prod(down, across)


@dataclass(frozen=True)
class ImageLayout:
    """One image or clip: how many tokens it has in the prompt, and its tiles. Tokens outside tiles are structure.

    The tiles of a clip come frame by frame, each frame with equally many.

    candidates: (n,) indices of the tokens in tiles, ascending; methods choose among these. centers: (n, 2), and cells,
    (n, 3) tile, row and column, theirs.
    """

    tokens: int
    tiles: tuple[Tile, ...]
    candidates: Tensor = field(init=False)
    centers: Tensor = field(init=False)
    cells: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if not self.tiles:
            raise ValueError("a clip without frames has no tokens to choose from: leave it out of the prompt")
        # Methods inside the LLM choose among these; the rest (newline tokens) is pinned.
        index, order = torch.cat([tile.index for tile in self.tiles]).sort()
        object.__setattr__(self, "candidates", index)
        object.__setattr__(self, "centers", torch.cat([tile.centers() for tile in self.tiles])[order])
        cells = [torch.cartesian_prod(torch.tensor([i]), *map(torch.arange, t.grid)) for i, t in enumerate(self.tiles)]
        object.__setattr__(self, "cells", torch.cat(cells)[order])

    @property
    def pinned(self) -> int:
        """Tokens that always stay."""
        return self.tokens - len(self.candidates)

    @property
    def frames(self) -> int:
        """Of a clip; 1 for a picture."""
        return 1 + max(tile.frame for tile in self.tiles)

    @property
    def tracks(self) -> list[list[int]]:
        """The tiles that show the same place in frame after frame, by their numbers; of a picture each alone."""
        each = len(self.tiles) // self.frames
        return [list(range(place, len(self.tiles), each)) for place in range(each)]


def as_clip(pictures: Sequence[ImageLayout]) -> ImageLayout:
    """One layout of pictures that follow one another in the prompt, the frames of a clip."""
    tiles, tokens = [], 0
    for frame, picture in enumerate(pictures):
        tiles += [replace(tile, index=tile.index + tokens, frame=frame) for tile in picture.tiles]
        tokens += picture.tokens
    return ImageLayout(tokens, tuple(tiles))
