"""P-Sigmoid: a rate for every layer, on an S-shaped curve through the depth of the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import register
from .budgets import check_range
from .schedules import ScheduledMethod


def sigmoid_curve(midpoint: Tensor, steepness: float, floor: Tensor, depth: int) -> Tensor:
    """Rates of layers 1 to depth - 1: `floor + (1 - floor) / (1 + exp(steepness * (layer / depth - midpoint)))`.

    midpoint, floor: (groups,) float64. Returns (groups, depth - 1).
    """
    at = torch.arange(1, depth, dtype=torch.float64, device=midpoint.device) / depth
    floor = floor.unsqueeze(1)
    return floor + (1 - floor) * torch.sigmoid(steepness * (midpoint.unsqueeze(1) - at))


def sigmoid_rates(share: Tensor, steepness: float, floor: float, depth: int) -> Tensor:
    """Such rates with a given mean; the midpoint is found by bisection.

    share: (groups,) float64 in (0, 1]; where it is below `floor`, all rates are the share. Returns (groups, depth - 1).
    """
    low_end = torch.minimum(torch.full_like(share, floor), share)
    # From here on the sigmoid is 0, or 1, to the last digit at every layer.
    low, high = torch.full_like(share, -40 / steepness), torch.full_like(share, 1 + 40 / steepness)
    for _ in range(60):
        middle = (low + high) / 2
        less = sigmoid_curve(middle, steepness, low_end, depth).mean(1) < share
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return sigmoid_curve(high, steepness, low_end, depth)


@lru_cache(maxsize=256)
def _rates(keep: float, steepness: float, floor: float, depth: int) -> tuple[float, ...]:
    return tuple(sigmoid_rates(torch.tensor([keep], dtype=torch.float64), steepness, floor, depth)[0].tolist())


@register("psigmoid")
@dataclass
class PSigmoid(ScheduledMethod):
    """In front of every layer drop the image tokens that the layer in front attends to least, along an S-shaped curve.

    Layer l of L sees `floor + (1 - floor) / (1 + exp(steepness * (l / L - midpoint)))` of each image's tokens; the
    midpoint follows from `keep`. `foveate search --method psigmoid` finds steepness, floor and `keep`. Survivors keep
    their order and position ids. Where a sample has several images, each keeps its own share.

    keep: fraction of each image's tokens, or tokens per image, as the mean over the layers behind the first (which sees
        them all); None for that of `schedule`, or 0.5.
    steepness: of the curve, over the depth of the whole model; 12 is this library's default, near the logistic that
        AutoPrune's code fits to 32 layers (0.364 a layer).
    floor: the fraction that even the deepest layers see, below `keep`; 0 (at least one token stays) is this library's
        default.
    rows: whose attention in the layer in front ranks the tokens: "last", the prompt's last token's, or "text", that of
        all text from the sample's first image on.
    schedule: a file that `foveate search` wrote, for the options that are not given otherwise.

    Source: P-Sigmoid, arXiv 2412.00556: that the curve is a sigmoid whose parameters a Bayesian optimisation finds. Its
    form is not published; this one, rows, heads and position ids are this library's choices.
    """

    summary = "last prompt token's attention drops tokens at every layer, along an S-shaped curve"
    source = "P-Sigmoid, arXiv 2412.00556"

    steepness: float = 12.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("steepness", self.steepness, 0.1, 1000)
        check_range("floor", self.floor, 0, 1)
        if isinstance(self.keep, float) and self.floor >= self.keep:
            raise ValueError(f"floor must be below keep={self.keep}, got {self.floor}")

    def curve(self, share: Tensor, depth: int) -> Tensor:
        return sigmoid_rates(share, self.steepness, self.floor, depth)

    def rates_at(self, depth: int) -> tuple[float, ...]:
        assert isinstance(self.keep, float)
        return _rates(self.keep, self.steepness, self.floor, depth)  # asked for at every stage of every prompt
