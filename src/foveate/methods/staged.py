"""Base of the methods that drop image tokens in several stages inside the LLM."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import LayerMethod
from .budgets import check_keep, check_range, floor_budget, scaled_layers
from .tokens import LayerTokens


def geometric_share(share: Tensor, stage: int, stages: int) -> Tensor:
    """Fraction of each image left after a stage, when every stage keeps the same fraction of what it is given.

    share: (groups,) fraction left after the last stage; stage counts from 0. Returns (groups,).
    """
    return share ** ((stage + 1) / stages)


@dataclass
class StagedMethod(LayerMethod):
    """Several stages; `keep` is what the last one leaves.

    layers: the first layer without the dropped tokens of each stage; None for the published ones at the same
        relative depth of the model at hand.
    earlier: what the stages before the last leave, each of the same kind as `keep`, descending; None for a
        geometric schedule, in which every stage keeps the same fraction of what it is given.
    """

    published: ClassVar[tuple[int, ...]]
    published_depth: ClassVar[int] = 32

    layers: tuple[int, ...] | None = None
    earlier: tuple[float | int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            # JSON knows no tuples.
            self.layers = _tuple("layers", self.layers)
            for layer in self.layers:
                check_range("layers", layer, 1, integer=True)
            if not self.layers or list(self.layers) != sorted(set(self.layers)):
                raise ValueError(f"layers must be ascending and at least one, got {self.layers}")
        if self.earlier is not None:
            self.earlier = _tuple("earlier", self.earlier)
            for value in self.earlier:
                check_keep(value)
            left = [*self.earlier, self.keep]
            if len(set(map(type, left))) > 1 or left != sorted(left, reverse=True):
                raise ValueError(f"earlier and keep must be of one kind and descending, got {left}")

    def stages(self, depth: int) -> tuple[int, ...]:
        layers = scaled_layers(self.published, self.published_depth, depth) if self.layers is None else self.layers
        if self.earlier is not None and len(self.earlier) != len(layers) - 1:
            raise ValueError(f"earlier must have {len(layers) - 1} values, one for each stage but the last")
        return layers

    def stage_budget(self, tokens: LayerTokens) -> Tensor:
        """(groups,) tokens of each image that go on after the stage at hand."""
        if self.earlier is None:
            stages = len(self.stages(tokens.depth))
            share = geometric_share(self.share(tokens.groups), tokens.stage, stages)
        else:
            keep = (*self.earlier, self.keep)[tokens.stage]
            share = dataclasses.replace(self, keep=keep, earlier=None).share(tokens.groups)
        return floor_budget(share, tokens.groups)


def _tuple(name: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, (tuple, list)):
        raise ValueError(f"{name} must be a tuple or None, got {values!r}")
    return tuple(values)
