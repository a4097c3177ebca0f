"""G-Search: a rate for every layer, found by a search from the first to the last."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor

from . import register
from .budgets import check_range
from .schedules import ScheduledMethod, scaled


@register("gsearch")
@dataclass
class GSearch(ScheduledMethod):
    """In front of every layer drop the image tokens that the layer in front attends to least, to rates that were found.

    `foveate search --method gsearch` finds the rates: layer by layer, the least that does not lower a score. Survivors
    keep their order and position ids. Where a sample has several images, each keeps its own share.

    keep: fraction of each image's tokens, or tokens per image, as the mean over the layers behind the first (which sees
        them all); None for the mean of `rates`, or 0.5. Where `rates` have another mean, all are drawn towards 0 or 1
        by the same fraction.
    rates: the fraction of each image's tokens that each layer from 1 on sees, in [0, 1], not increasing; from the first
        0 on no image token is left. None, where nothing was searched for, is a straight line from 1 at layer 0 to 0
        behind the last: this library's default.
    rows: whose attention in the layer in front ranks the tokens: "last", the prompt's last token's, or "text", that of
        all text from the sample's first image on.
    schedule: a file that `foveate search` wrote, for the options that are not given otherwise.

    Source: G-Search, arXiv 2412.00556: the search, and that the layer in front ranks. Rows, heads and position ids are
    not published; those here are this library's choices, as in FastV.
    """

    summary = "last prompt token's attention drops tokens at every layer, as many as a search on your questions found"
    source = "G-Search, arXiv 2412.00556"

    rates: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rates = _checked(self.rates)

    def own_keep(self) -> float:
        rates = _checked(self.rates)
        if rates is not None and not any(rates):
            raise ValueError("rates are all 0, which leaves no image token behind the first layer: raise the first")
        return 0.5 if rates is None else fmean(rates)

    def curve(self, share: Tensor, depth: int) -> Tensor:
        rates = self.rates
        if rates is None:
            rates = tuple(1 - layer / depth for layer in range(1, depth))
        elif len(rates) != depth - 1:
            raise ValueError(
                f"{self.name}: {len(rates)} rates are for a model of {len(rates) + 1} layers, this one has {depth}: "
                f"give {depth - 1} rates, or search for them on this model (foveate search)"
            )
        return scaled(rates, share)


def _checked(rates: Any) -> tuple[float, ...] | None:
    if rates is None:
        return None
    if not isinstance(rates, (tuple, list)) or not rates:
        raise ValueError(f"rates must be a tuple with a number for each layer from 1 on, or None, got {rates!r}")
    for rate in rates:
        check_range("rates", rate, 0, 1)
    if list(rates) != sorted(rates, reverse=True):
        raise ValueError(f"rates must not increase, since what a layer dropped cannot come back, got {rates}")
    return tuple(map(float, rates))  # JSON knows no tuples
