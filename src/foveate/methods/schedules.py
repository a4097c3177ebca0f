"""Base of the methods that say for every layer which fraction of the image tokens it sees: a schedule of rates."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from .base import LayerMethod, read_config
from .budgets import floor_budget, topk_mask
from .fastv import received_attention
from .tokens import LayerTokens


def falls(rates: Sequence[float]) -> tuple[int, ...]:
    """The layers that see less than the layer in front of them, or the first that could where none does.

    rates: of layers 1, 2, ... Falls of less than a millionth wait until they add up.
    """
    layers, left = [], 1.0
    for layer, rate in enumerate(rates, start=1):
        if rate < left - 1e-6:
            layers.append(layer)
            left = rate
    return tuple(layers) or (1,)


def scaled(rates: Sequence[float], share: Tensor) -> Tensor:
    """Rates of the same shape whose mean is `share`: drawn towards 0, or towards 1, all by the same fraction.

    rates: in [0, 1]. share: (groups,) float64. Returns (groups, layers).
    """
    mean, share = fmean(rates), share.unsqueeze(1)
    level = torch.tensor(rates, dtype=torch.float64, device=share.device)
    lower = level * (share / mean if mean else 0.0)
    upper = 1 - (1 - level) * ((1 - share) / (1 - mean) if mean < 1 else 1.0)
    return torch.where(share < mean, lower, upper)


def token_layers(rates: Sequence[float]) -> float:
    """Mean over all layers of the fraction of image tokens they see; rates: of all layers but the first, in [0, 1]."""
    return fmean([1.0, *rates])


@dataclass
class ScheduledMethod(LayerMethod):
    """A rate for every layer behind the first; `keep` is their mean.

    rows: whose attention in the layer in front ranks the tokens: the prompt's last token's, or that of all text behind
        the start of the sample's first image.
    schedule: a file that `foveate search` wrote, for the options that are not given otherwise.
    """

    keep: float | int = None  # type: ignore[assignment]  # a number once __post_init__ is through
    rows: Literal["last", "text"] = "last"
    schedule: str | Path | None = None

    def __post_init__(self) -> None:
        if self.schedule is not None:
            self._read(Path(self.schedule))
            self.schedule = None  # what it says stands in the other options now
        if self.keep is None:
            self.keep = self.own_keep()
        super().__post_init__()
        if self.rows not in ("last", "text"):
            raise ValueError(f"rows must be 'last' or 'text', got {self.rows!r}")

    def _read(self, path: Path) -> None:
        try:
            config = read_config(path)
        except OSError as error:
            raise ValueError(f"cannot read the schedule {path}: {error.strerror}") from error
        if config.get("method") != self.name:
            raise ValueError(f"the schedule {path} is one of {config.get('method')}, not of {self.name}")
        for field in dataclasses.fields(self):
            if field.name in config and getattr(self, field.name) == field.default:
                setattr(self, field.name, config[field.name])

    def own_keep(self) -> float:
        """What `keep` is where none is given."""
        return 0.5

    @abstractmethod
    def curve(self, share: Tensor, depth: int) -> Tensor:
        """The rates of layers 1 to depth - 1, not increasing. share: (groups,) their means. (groups, depth - 1)."""

    def rates_at(self, depth: int) -> tuple[float, ...]:
        """The rates of layers 1 to depth - 1, where `keep` is a fraction: the same for every image."""
        return tuple(self.curve(torch.tensor([self.keep], dtype=torch.float64), depth)[0].tolist())

    def stages(self, depth: int) -> tuple[int, ...]:
        # As a count, `keep` is another fraction of every image: any layer may drop something.
        return falls(self.rates_at(depth)) if isinstance(self.keep, float) else tuple(range(1, depth))

    def stage_budget(self, tokens: LayerTokens) -> Tensor:
        """(groups,) tokens of each image that go on; a rate of 0 leaves none, any other at least one."""
        groups, behind = tokens.groups, self.stages(tokens.depth)[tokens.stage] - 1
        if isinstance(self.keep, float):
            rate = torch.full_like(groups.total, self.rates_at(tokens.depth)[behind], dtype=torch.float64)
        else:
            rate = self.curve(self.share(groups), tokens.depth)[:, behind]
        return torch.where(rate > 0, floor_budget(rate, groups), 0)

    def score(self, tokens: LayerTokens) -> Tensor:
        """(groups, n) mean over heads and rows of what each image token receives, -inf at padding."""
        if self.rows == "last":
            return received_attention(tokens.last_attention())
        return received_attention(tokens.of_images(tokens.mean_attention(tokens.text)))

    def select(self, tokens: LayerTokens) -> Tensor:
        return topk_mask(self.score(tokens), self.stage_budget(tokens))
