"""Choosing among the tokens of many images of different shapes, between the vision encoder and the LLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..layout import ImageLayout
from .base import EncoderMethod, token_budget
from .tokens import EncoderTokens

_BY_LAYER = ("received", "given", "cls")


def tile_budgets(layout: ImageLayout, keep: float | int) -> list[int]:
    """How many tokens of each tile stay at this `keep`: the image's budget, less what is pinned, shared by size."""
    sizes = [len(tile.index) for tile in layout.tiles]
    return apportion(token_budget(keep, layout.tokens) - layout.pinned, sizes)


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
) -> list[tuple[Tensor, Tensor]]:
    """Ask a method for the tokens of all images, equally shaped tiles together.

    features: per image its (tokens, hidden). patches: what was read of the encoder, by name, (all patches, ...).
    project: from the encoder's states to features. images, pictures: further tensors by name, (images, ...) and
    (pictures, ...), a picture being what the encoder sees at once. picture: (all patches,) which of them.

    Returns per image which tokens stay, bool (tokens,), and its features: the same tensor, or a new one where the
    method merges.
    """
    device = features[0].device
    keeps = [torch.ones(layout.tokens, dtype=torch.bool, device=device) for layout in layouts]
    merged = list(features)
    shapes: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for i, layout in enumerate(layouts):
        for t, budget in enumerate(tile_budgets(layout, method.keep)):
            shapes.setdefault(layout.tiles[t].grid, []).append((i, t, budget))
    for grid, members in shapes.items():
        at = torch.stack([layouts[i].tiles[t].patches for i, t, _ in members]).to(device)
        # A token that several patches join into is what they are on average.
        means = {name: values[at] if at.ndim == 2 else values[at].mean(2) for name, values in patches.items()}
        read = {name: values.transpose(1, 2) if name in _BY_LAYER else values for name, values in means.items()}
        of = torch.tensor([i for i, *_ in members], device=device)
        read |= {name: values[of] for name, values in (images or {}).items()}
        if picture is not None:
            read |= {name: values[picture[at.flatten(1)[:, 0]]] for name, values in (pictures or {}).items()}
        index = [layouts[i].tiles[t].index.to(device) for i, t, _ in members]
        if method.reads & {"features", "states"}:
            read["features"] = torch.stack([features[i][spot] for (i, *_), spot in zip(members, index, strict=True)])
            read.setdefault("states", read["features"])
        budgets = [budget for *_, budget in members]
        tokens = EncoderTokens(grid, len(members), device, project=project, most=max(budgets), **read)
        chosen = method.select(tokens, torch.tensor(budgets, device=device))
        becomes = method.merge(tokens, chosen)
        for m, ((i, *_), spot) in enumerate(zip(members, index, strict=True)):
            keeps[i][spot] = chosen[m]
            if becomes is not None:
                new = becomes[m].to(merged[i].dtype).where(chosen[m].unsqueeze(-1), merged[i][spot])
                merged[i] = merged[i].index_copy(0, spot, new)
    return list(zip(keeps, merged, strict=True))
