"""Images between encoder and decoder: which of their tokens an encoder method keeps, and where they stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families.base import ImageLayout
from ..methods.base import EncoderMethod, token_budget
from ..methods.tokens import EncoderTokens, ImageGroups
from .errors import UnsupportedError

_BY_LAYER = ("received", "given", "cls")


@dataclass(frozen=True)
class EncodedImage:
    """What is known of an image once it is encoded; travels on the image's feature tensor.

    keep: bool (tokens,), what an encoder method chose; None where all stay.
    """

    layout: ImageLayout
    keep: Tensor | None


def choose_encoder_tokens(
    method: EncoderMethod,
    layouts: Sequence[ImageLayout],
    features: Sequence[Tensor],
    patches: dict[str, Tensor],
    project: Callable[[Tensor], Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """Ask a method for the tokens of all images, equally shaped tiles together.

    features: per image its (tokens, hidden). patches: what was read of the encoder, by name, (all patches, ...).
    project: from the encoder's states to features. Returns per image which tokens stay, bool (tokens,), and its
    features: the same tensor, or a new one where the method merges.
    """
    device = features[0].device
    keeps = [torch.ones(layout.tokens, dtype=torch.bool, device=device) for layout in layouts]
    merged = list(features)
    shapes: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for i, layout in enumerate(layouts):
        sizes = [len(tile.index) for tile in layout.tiles]
        for t, budget in enumerate(apportion(token_budget(method.keep, layout.tokens) - layout.pinned, sizes)):
            shapes.setdefault(layout.tiles[t].grid, []).append((i, t, budget))
    for grid, members in shapes.items():
        at = torch.stack([layouts[i].tiles[t].patches for i, t, _ in members]).to(device)
        read = {
            name: values[at].transpose(1, 2) if name in _BY_LAYER else values[at] for name, values in patches.items()
        }
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


def group_images(images: Sequence[EncodedImage], is_image: Tensor) -> tuple[ImageGroups, list[tuple[int, Tensor]]]:
    """Find the images' tokens in the prompt.

    is_image: bool (batch, q), the placeholders of this forward. Returns the groups of candidates and, per
    image, its row and the positions of all its tokens.
    """
    spots = is_image.nonzero()
    sizes = [image.layout.tokens for image in images]
    if sum(sizes) != len(spots):
        raise UnsupportedError(
            f"the prompt has {len(spots)} image tokens but the images were encoded to {sum(sizes)}: pass prompt and "
            "pixels that belong together (precomputed features must be encoded while the model is pruned)"
        )
    places, rows, end = [], spots[:, 0].tolist(), 0
    for part in spots.split(sizes):
        row, end = rows[end], end + len(part)
        if rows[end - 1] != row:
            raise UnsupportedError("the image tokens of one sample do not match its images: check the prompts")
        places.append((row, part[:, 1]))
    device = is_image.device
    candidates = [place[i.layout.candidates.to(device)] for i, (_, place) in zip(images, places, strict=True)]
    groups = ImageGroups(
        torch.nn.utils.rnn.pad_sequence(candidates, batch_first=True, padding_value=-1),
        torch.tensor([row for row, _ in places], device=device),
        torch.tensor([len(c) for c in candidates], device=device),
        torch.tensor([i.layout.pinned for i in images], device=device),
        centers=torch.nn.utils.rnn.pad_sequence([i.layout.centers for i in images], batch_first=True).to(device),
    )
    return groups, places
