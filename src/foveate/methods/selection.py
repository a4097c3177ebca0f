"""Choosing among the tokens of many images of different shapes, between the vision encoder and the LLM."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..layout import ImageLayout, Tile
from .base import EncoderMethod, VideoMethod, token_budget
from .contract import check_budget, check_mask, check_scores, reading
from .tokens import EncoderTokens, VideoTokens

_BY_LAYER = ("received", "given", "cls")


def tile_budgets(layout: ImageLayout, keep: float | int) -> list[int]:
    """How many tokens of each tile stay at this `keep`: the image's budget, less what is pinned, shared by size."""
    sizes = [len(tile.index) for tile in layout.tiles]
    share = keep * layout.frames if isinstance(keep, int) else keep
    return apportion(token_budget(share, layout.tokens) - layout.pinned, sizes)


def kept_tokens(layout: ImageLayout, keep: float | int) -> int:
    """How many tokens of this layout stay at this `keep`, pinned ones included.

    What every method between encoder and LLM may spend; one that keeps whole rows of the grid may spend less.
    """
    return layout.pinned + sum(tile_budgets(layout, keep))


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """Share `total` among parts in proportion to their sizes (largest remainder); every part gets at least 1."""
    total, whole = max(total, len(sizes)), sum(sizes)
    if total >= whole:
        return list(sizes)
    shares = [max(1, total * size // whole) for size in sizes]
    # How far each part is above its due; those that got their 1 for nothing are paid for by the others.
    above = [share - total * size / whole for share, size in zip(shares, sizes, strict=True)]
    for _ in range(abs(total - sum(shares))):
        step = 1 if sum(shares) < total else -1
        i = max((i for i in range(len(sizes)) if step > 0 or shares[i] > 1), key=lambda i: -step * above[i])
        shares[i] += step
        above[i] += step
    return shares


class Chosen(NamedTuple):
    """Of an image. stays: bool (tokens,). features: (tokens, hidden), the same tensor, or a new one where the method
    merges. scores: (tokens,) by what the method ranks them, NaN at pinned ones; None where it does not, or unasked."""

    stays: Tensor
    features: Tensor
    scores: Tensor | None


def select_tokens(
    method: EncoderMethod,
    layouts: Sequence[ImageLayout],
    features: Sequence[Tensor],
    patches: dict[str, Tensor],
    project: Callable[[Tensor], Tensor],
    *,
    images: dict[str, Tensor] | None = None,
    pictures: dict[str, Tensor] | None = None,
    picture: Tensor | None = None,
    scored: bool = False,
) -> list[Chosen]:
    """Ask a method for the tokens of all images and clips, equally shaped ones together.

    Most methods are asked about tiles, which the frames of a clip are, too; a `VideoMethod` about whole clips.

    features: per image its (tokens, hidden). patches: what was read of the encoder, by name, (all patches, ...).
    project: from the encoder's states to features. images, pictures: further tensors by name, (images, ...) and
    (pictures, ...), a picture being what the encoder sees at once. picture: (all patches,) which of them. scored:
    whether to tell, too, by what the method ranks tokens.

    Raises:
        UnsupportedError: for a clip whose frames differ in shape, under a method that compares them.
    """
    device = features[0].device
    keeps = [torch.ones(layout.tokens, dtype=torch.bool, device=device) for layout in layouts]
    merged, ranked = list(features), dict[int, Tensor]()
    shapes: dict[tuple[int, tuple[int, int], tuple[int, ...]], list[_Member]] = {}
    for member in _members(method, layouts):
        shapes.setdefault((len(member.index), member.grid, tuple(member.patches.shape[2:])), []).append(member)
    for (frames, grid, _), members in shapes.items():
        # (members, frames, n): for methods that are asked about tiles, one frame each.
        at = torch.stack([member.patches for member in members]).to(device)
        index = [member.index.to(device) for member in members]
        # A token that several patches join into is what they are on average.
        means = {name: values[at] if at.ndim == 3 else values[at].mean(3) for name, values in patches.items()}
        read = {name: values.transpose(-1, -2) if name in _BY_LAYER else values for name, values in means.items()}
        if method.reads & {"features", "states"}:
            pairs = zip(members, index, strict=True)
            read["features"] = torch.stack([features[member.image][spot] for member, spot in pairs])
            read.setdefault("states", read["features"])
        most, budget = max(m.budget for m in members), torch.tensor([m.budget for m in members], device=device)
        if isinstance(method, VideoMethod):
            clips = VideoTokens(grid, len(members), frames, device, most=most, **read)
            with reading(method, clips, method.reads):
                chosen, becomes = method.choose(clips, budget)
                scores = method.score(clips) if scored else None
            check_mask(method, chosen, (len(members), frames, grid[0] * grid[1]))
        else:
            of = torch.tensor([member.image for member in members], device=device)
            read = {name: values[:, 0] for name, values in read.items()}
            read |= {name: values.to(device)[of] for name, values in (images or {}).items()}
            if picture is not None:
                read |= {name: values[picture[at.flatten(1)[:, 0]]] for name, values in (pictures or {}).items()}
            tokens = EncoderTokens(grid, len(members), device, project=project, most=most, **read)
            with reading(method, tokens, method.reads):
                chosen = method.select(tokens, budget)
                check_mask(method, chosen, (len(members), grid[0] * grid[1]))
                becomes = method.merge(tokens, chosen)
                scores = method.score(tokens) if scored else None
        check_scores(method, scores, chosen.shape)
        check_budget(method, chosen, budget if method.fills_budget else None)
        for m, (member, spot) in enumerate(zip(members, index, strict=True)):
            i, spot = member.image, spot.flatten()
            stays = chosen[m].flatten()
            keeps[i][spot] = stays
            if scores is not None:
                unasked = torch.full((layouts[i].tokens,), torch.nan, dtype=torch.float32, device=device)
                ranked.setdefault(i, unasked)[spot] = scores[m].detach().flatten().float()
            if becomes is not None:
                new = becomes[m].flatten(0, -2).to(merged[i].dtype).where(stays.unsqueeze(-1), merged[i][spot])
                merged[i] = merged[i].index_copy(0, spot, new)
    return [Chosen(*each, ranked.get(i)) for i, each in enumerate(zip(keeps, merged, strict=True))]


@dataclass(frozen=True)
class _Member:
    """What a method is asked about at once: a tile of an image, or the same tile through all frames of a clip.

    image: which of the images. index: (frames, n); patches: (frames, n) or (frames, n, k), as those of `Tile`. budget:
    tokens that may stay.
    """

    image: int
    grid: tuple[int, int]
    index: Tensor
    patches: Tensor
    budget: int


def _members(method: EncoderMethod, layouts: Sequence[ImageLayout]) -> Iterator[_Member]:
    for image, layout in enumerate(layouts):
        budgets = tile_budgets(layout, method.keep)
        alone = [[number] for number in range(len(layout.tiles))]
        for track in layout.tracks if isinstance(method, VideoMethod) else alone:
            tiles = [layout.tiles[number] for number in track]
            grids = sorted({tile.grid for tile in tiles})
            if len(grids) > 1:
                raise UnsupportedError(
                    f"{method.name} compares the frames of a clip, and these differ in shape ({grids[0][0]} x "
                    f"{grids[0][1]} and {grids[-1][0]} x {grids[-1][1]} tokens): resize the frames to one size, or use "
                    "a method that looks at each frame alone"
                )
            index, patches = torch.stack([tile.index for tile in tiles]), torch.stack(_alike(tiles))
            yield _Member(image, grids[0], index, patches, sum(budgets[number] for number in track))


def _alike(tiles: Sequence[Tile]) -> list[Tensor]:
    """The patches of each tile, where fewer join in some named so often that as many join in each, their mean as is."""
    joining = [tile.patches.shape[-1] if tile.patches.ndim > 1 else 1 for tile in tiles]
    most = math.lcm(*joining)
    if most == min(joining):
        return [tile.patches for tile in tiles]
    return [tile.patches.view(len(tile.index), -1).repeat(1, most // n) for tile, n in zip(tiles, joining, strict=True)]
