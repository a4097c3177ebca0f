"""By what methods ranked image tokens, as `foveate show` draws it: from the last to the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.engine.report import PruneReport


@dataclass(frozen=True)
class Ranked:
    """What a method ranked when it chose at a layer.

    place: of the method. ranks: for each image (1 | heads, n) in [0, 1], NaN where it was not asked.
    """

    method: str
    place: str
    layer: int
    ranks: list[Tensor]

    @property
    def at(self) -> str:
        """Where it chose."""
        return "before the LLM" if self.place == "encoder" else f"layer {self.layer}"


def ranked(report: PruneReport) -> list[Ranked]:
    """All choices that went by numbers, in the order of the layers, of the first sample."""
    import foveate

    assert report.image_tokens is not None
    found = []
    for name, of_layers in report.scores.items():
        place = foveate.method_class(name).place
        for layer, scores in of_layers.items():
            images = [scores[0][:, image.positions.to(scores.device)] for image in report.image_tokens[0]]
            found.append(Ranked(name, place, layer, [ranks(each).cpu() for each in images]))
    return sorted(found, key=lambda each: (each.layer, each.place != "encoder"))


def last_before(found: Sequence[Ranked], layer: int) -> int | None:
    """Which of them decided what a layer sees or holds: the last up to it; None where nothing has been chosen yet."""
    return max((number for number, each in enumerate(found) if each.layer <= layer), default=None)


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
