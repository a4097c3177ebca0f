"""Draws on the picture what all layers, one of them, or one of its heads keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from foveate.evaluation.maps import View, draw_share, panel
from foveate.evaluation.show import Layer

ACROSS = 4  # frames side by side: they must be seen on a phone
GAP = 6


def draw(
    shown: Sequence[View], layers: Sequence[Layer], layer: int | None = None, head: int | None = None
) -> Image.Image:
    """The pictures with dropped tokens dark; in between, the brighter the more layers and heads keep one.

    layer: position in `layers`; None for all of them. head: of that layer; None for all of its heads.
    """
    shares = _shares(layers if layer is None else [layers[layer]], None if layer is None else head)
    return grid([panel([view], shares, draw_share) for view in shown])


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in rows, in reading order."""
    rows = [pictures[start : start + ACROSS] for start in range(0, len(pictures), ACROSS)]
    wide = max(sum(picture.width + GAP for picture in row) for row in rows) - GAP
    canvas = Image.new("RGB", (wide, sum(max(p.height for p in row) + GAP for row in rows) - GAP), "white")
    top = 0
    for row in rows:
        left = 0
        for picture in row:
            canvas.paste(picture, (left, top))
            left += picture.width + GAP
        top += max(picture.height for picture in row) + GAP
    return canvas


def differ(layers: Sequence[Layer]) -> bool:
    """Whether some layer keeps other tokens than another."""
    return any(not _alike(layers[0], layer) for layer in layers[1:])


def heads(layers: Sequence[Layer]) -> int:
    """How many heads choose for themselves; 1 where they agree."""
    return max(layer.heads for layer in layers)


def caption(layers: Sequence[Layer], layer: int | None = None, head: int | None = None) -> str:
    """What `draw` shows, in one sentence."""
    tokens = sum(kept.shape[-1] for kept in layers[0].kept)
    if layer is None and differ(layers):
        each = f"{len(layers)} layers" + (f" x {heads(layers)} heads" if heads(layers) > 1 else "")
        return f"The brighter a token, the more of {each} keep it."
    one = layers[layer or 0]
    count = one.count if head is None else float(sum(k[head if len(k) > 1 else 0].sum() for k in one.kept))
    who = "Every layer" if layer is None else f"Layer {one.index}" + ("" if head is None else f", head {head}")
    rest = "" if count == tokens else _rest(one)
    alone = ", and each head chooses for itself: the brighter, the more of them agree" if one.heads > 1 else ""
    return f"{who} keeps {count:.4g} of {tokens} image tokens{rest}{alone if head is None else ''}."


def _rest(layer: Layer) -> str:
    return "; the others left when it had read the prompt" if layer.freed else "; the others never reached it"


def _shares(layers: Sequence[Layer], head: int | None) -> list[Tensor]:
    """For each image (n,): how large a part of the layers and heads keeps each token."""
    each = [[_share(kept, head) for kept in layer.kept] for layer in layers]
    return [torch.stack(shares).mean(0) for shares in zip(*each, strict=True)]


def _share(kept: Tensor, head: int | None) -> Tensor:
    return kept.float().mean(0) if head is None else kept[head if len(kept) > 1 else 0].float()


def _alike(one: Layer, other: Layer) -> bool:
    return all(a.shape == b.shape and bool((a == b).all()) for a, b in zip(one.kept, other.kept, strict=True))
