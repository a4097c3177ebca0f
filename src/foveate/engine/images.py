"""Images between encoder and decoder: what travels with their features, and where they stand in the prompt."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..layout import ImageLayout
from ..methods.tokens import ImageGroups
from .devices import on

Features = Tensor | list[Tensor] | tuple[Tensor, ...]
"""Of all images: a tensor each, a tensor for the images of each sample, or one tensor (tiles, n, hidden)."""


@dataclass(frozen=True)
class EncodedImage:
    """What is known of an image once it is encoded; travels with its features, as `attach` says.

    keep: bool (tokens,), what an encoder method chose; None where all stay. session: a mark of the pruning under which
    it was encoded, None for none. scores: (tokens,), by what it chose, where that is recorded.
    """

    layout: ImageLayout
    keep: Tensor | None
    session: object = None
    scores: Tensor | None = None


class _Tensor(NamedTuple):
    """What travels on an output whose features are one tensor: this tensor, and its images."""

    features: Tensor
    images: Sequence[EncodedImage]


def by_image(features: Features, layouts: Sequence[ImageLayout], family: str) -> list[Tensor]:
    """Per image its (tokens, hidden). features: of all of them, in the container that the family's encoder uses.

    Raises:
        UnsupportedError: where the layouts have other sizes than what was encoded.
    """
    sizes = [layout.tokens for layout in layouts]
    parts = [part.flatten(0, -2) for part in _parts(features)]
    if [len(part) for part in parts] == sizes:
        return parts
    tokens = sum(map(len, parts))
    if tokens != sum(sizes):
        raise UnsupportedError(
            f"the vision encoder made {tokens} tokens of these images, and {family} images of their sizes have "
            f"{sum(sizes)}: pass pixels and sizes as the model's own processor makes them"
        )
    return list(torch.cat(parts).split(sizes))


def refilled(features: Features, images: Sequence[Tensor]) -> Features:
    """The same container with other features in it. images: per image its (tokens, hidden)."""
    old = _parts(features)
    made = torch.cat(list(images)).split([part.shape[:-1].numel() for part in old])
    new = [part.view_as(like) for part, like in zip(made, old, strict=True)]
    return new[0] if isinstance(features, Tensor) else type(features)(new)


def attach(output: Any, name: str, images: Sequence[EncodedImage]) -> None:
    """Let what is known of the images travel with the encoder's output.

    On each tensor of a list, since lists are taken apart and repeated for beams; where one tensor holds all images, on
    the output. name: of the field that holds the features.
    """
    features = getattr(output, name)
    output.to = functools.partial(_sent, output, name)
    if isinstance(features, Tensor):
        output._foveate = _Tensor(features, images)
        return
    left = list(images)
    room = 0
    for part in features:
        part._foveate, room = [], room + part.shape[:-1].numel()
        while left and room > 0:
            image = left.pop(0)
            part._foveate.append(image)
            room -= image.layout.tokens


def _sent(output: Any, name: str, device: Any, **options: Any) -> Any:
    """An encoder's output elsewhere, with what travels with it: accelerate sends whatever has a method `to` by that."""
    images, sent = attached(output, name), type(output)(**on(torch.device(device), dict(output)))
    if images is not None:
        attach(sent, name, images)
    return sent


def attached(output: Any, name: str) -> list[EncodedImage] | None:
    """What travels with an encoder's output; None where it was made elsewhere, or is another's by now."""
    features = getattr(output, name)
    if isinstance(features, Tensor):
        mark = getattr(output, "_foveate", None)
        # For beams a longer one is made.
        if mark is None or not (mark.features is features or len(features) > len(mark.features)):
            return None
        return list(mark.images)
    images: list[EncodedImage] = []
    for part in features:
        if not hasattr(part, "_foveate"):
            return None
        images += part._foveate
    return images


def repeated(images: Sequence[EncodedImage], counts: Sequence[int]) -> list[EncodedImage]:
    """The images as often as a prompt that was repeated for beams shows them, row by row.

    counts: image tokens of each row of the prompt; rows made of one sample follow each other.
    """
    tokens = sum(image.layout.tokens for image in images)
    times = sum(counts) // tokens if tokens else 1
    if times < 2 or times * tokens != sum(counts) or len(counts) % times:
        return list(images)
    left, out = list(images), []
    for count in counts[::times]:
        sample = []
        while left and count > 0:
            sample.append(left.pop(0))
            count -= sample[-1].layout.tokens
        out += sample * times
    return out


def _parts(features: Features) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)


Place = tuple[int, Tensor]
"""Of an image in the prompt: its row, and there the positions (tokens,) of all its tokens."""


def place_images(
    images: Mapping[str, Sequence[EncodedImage]], placeholders: Mapping[str, Tensor]
) -> tuple[list[EncodedImage], list[Place]]:
    """Find the tokens of images and videos in the prompt; both in the order in which they stand there.

    images: of each medium, in order. placeholders: bool (batch, q), of each medium in this forward.
    """
    found: list[tuple[EncodedImage, Place]] = []
    for medium, encoded in images.items():
        found += zip(encoded, _places(encoded, placeholders[medium], medium), strict=True)
    if len(images) > 1:
        found.sort(key=lambda each: (each[1][0], int(each[1][1][0])))
    return [image for image, _ in found], [place for _, place in found]


def _places(images: Sequence[EncodedImage], placeholders: Tensor, medium: str) -> list[Place]:
    spots = placeholders.nonzero()
    sizes = [image.layout.tokens for image in images]
    if sum(sizes) != len(spots):
        raise UnsupportedError(
            f"the prompt has {len(spots)} {medium} tokens but the {medium}s were encoded to {sum(sizes)}: pass prompt "
            "and pixels that belong together (precomputed features must be encoded while the model is pruned)"
        )
    places, rows, end = [], spots[:, 0].tolist(), 0
    for part in spots.split(sizes):
        row, end = rows[end], end + len(part)
        if rows[end - 1] != row:
            raise UnsupportedError(f"the {medium} tokens of one sample do not match its {medium}s: check the prompts")
        places.append((row, part[:, 1]))
    return places


def group_images(images: Sequence[EncodedImage], places: Sequence[Place]) -> ImageGroups:
    """The candidates among the tokens of each image. places: of each image, as `place_images` found them."""
    device = places[0][1].device
    layouts = [image.layout for image in images]
    candidates = [place[i.candidates.to(device)] for i, (_, place) in zip(layouts, places, strict=True)]
    frames = [layout.frames for layout in layouts]
    return ImageGroups(
        torch.nn.utils.rnn.pad_sequence(candidates, batch_first=True, padding_value=-1),
        torch.tensor([row for row, _ in places], device=device),
        torch.tensor([len(c) for c in candidates], device=device),
        torch.tensor([layout.pinned for layout in layouts], device=device),
        centers=torch.nn.utils.rnn.pad_sequence([i.centers for i in layouts], batch_first=True).to(device),
        cells=torch.nn.utils.rnn.pad_sequence([i.cells for i in layouts], batch_first=True).to(device),
        frames=torch.tensor(frames, device=device) if max(frames) > 1 else None,
    )
