"""By what methods ranked image tokens, as `foveate show` draws it: from the last to the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from foveate.methods.base import EncoderMethod, VideoMethod
from foveate.methods.places import PLACES

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.engine.report import PruneReport


@dataclass(frozen=True)
class Ranked:
    """What a method ranked when it chose at a layer.

    place: of the method. ranks: for each image (1 | heads, n) in [0, 1], NaN where it was not asked; tokens compete
    with those of their image, or of their tile where the method is asked about tiles.
    """

    method: str
    place: str
    layer: int
    ranks: list[Tensor]

    @property
    def at(self) -> str:
        """Where it chose."""
        if self.place == "encoder":
            return "before the LLM"
        return f"layer {self.layer}, the last step" if self.place == "decode" else f"layer {self.layer}"

    @property
    def lasts(self) -> bool:
        """Whether later layers see no more than what was chosen, too."""
        return self.place in ("encoder", "layer", "cross", "logits")


def ranked(report: PruneReport) -> list[Ranked]:
    """All choices that went by numbers, in the order of the layers, of the first sample."""
    import foveate

    assert report.image_tokens is not None
    found = []
    for name, of_layers in report.scores.items():
        cls = foveate.method_class(name)
        tiled = issubclass(cls, EncoderMethod) and not issubclass(cls, VideoMethod)
        for layer, scores in of_layers.items():
            images = []
            for image in report.image_tokens[0]:
                own = scores[0][:, image.positions.to(scores.device)].cpu()
                parts = [tile.index for tile in image.tiles] if tiled else [torch.arange(own.shape[1])]
                whole = torch.full_like(own, torch.nan)
                for part in parts:
                    whole[:, part] = ranks(own[:, part])
                images.append(whole)
            found.append(Ranked(name, cls.place, layer, images))
    order = list(PLACES)
    return sorted(found, key=lambda each: (each.layer, order.index(each.place)))


def decided(found: Sequence[Ranked], layer: int) -> int | None:
    """Which of them decided last what a layer sees or holds; None where all that there is goes on.

    found: as `ranked` gives them.
    """
    fits = (number for number, each in enumerate(found) if each.layer == layer or (each.layer < layer and each.lasts))
    return max(fits, default=None)


def ranks(scores: Tensor) -> Tensor:
    """Each score's place among those of its row: from 0, the lowest, to 1; equal ones share the mean of their places.

    scores: (heads, n), NaN where nothing was asked, which stays. Float32 of the same shape.
    """
    out = torch.full_like(scores, torch.nan, dtype=torch.float32)
    for row, of_row in zip(out, scores, strict=True):
        asked = ~of_row.isnan()
        _, which, counts = of_row[asked].unique(return_inverse=True, return_counts=True)
        middle = counts.cumsum(0) - (counts + 1) / 2
        row[asked] = (middle / max(1, int(asked.sum()) - 1)).float()[which]
    return out
