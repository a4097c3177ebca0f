"""Images between encoder and decoder: what travels with their features, and where they stand in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..layout import ImageLayout
from ..methods.tokens import ImageGroups


@dataclass(frozen=True)
class EncodedImage:
    """What is known of an image once it is encoded; travels on the image's feature tensor.

    keep: bool (tokens,), what an encoder method chose; None where all stay. session: a mark of the pruning under which
    it was encoded, None for none.
    """

    layout: ImageLayout
    keep: Tensor | None
    session: object = None


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
        cells=torch.nn.utils.rnn.pad_sequence([i.layout.cells for i in images], batch_first=True).to(device),
    )
    return groups, places
