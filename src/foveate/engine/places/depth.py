"""Around decoder layers: some image tokens skip a layer and come back behind it as they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...methods.base import DepthMethod, LayerMethod, Method
from ...methods.contract import check_scores
from ..forward import Forward
from ..report import Outcome
from ..target import Target
from .place import Action, Place


class DepthPlace(Place):
    """The decoder layers that a method lets tokens skip. layers: these."""

    def __init__(self, target: Target, method: DepthMethod, outcome: Outcome) -> None:
        super().__init__(target, outcome)
        self.method = method
        self.layers = method.routed(len(target.kinds))

    @classmethod
    def of(cls, target: Target, methods: Sequence[Method], outcome: Outcome) -> Place | None:
        method = next((m for m in methods if isinstance(m, DepthMethod)), None)
        return None if method is None else cls(target, method, outcome)

    @classmethod
    def check(cls, target: Target, methods: Sequence[Method]) -> None:
        depth = len(target.kinds)
        for method in methods:
            if isinstance(method, DepthMethod):
                layers = method.routed(depth)
                if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < depth:
                    raise ValueError(
                        f"{method.name}: layers must be ascending and in [0, {depth - 1}] for this model, got "
                        f"{', '.join(map(str, layers)) or 'none'}"
                    )
                _check_own_keys(target, method, layers)
                for other in methods:
                    _check_readable(method, layers, other, depth)

    def act(self, forward: Forward) -> Action | None:
        return DepthAction(self, forward) if forward.brings_images else None


def _check_own_keys(target: Target, method: DepthMethod, layers: tuple[int, ...]) -> None:
    """Refuse layers that read the keys and values of earlier ones: what skips them leaves those where they are."""
    borrowing = [layer for layer in layers if target.sources[layer] != layer]
    if borrowing and not method.keeps_all:
        own = [layer for layer in layers if layer not in borrowing]
        raise UnsupportedError(
            f"{method.name} saves the keys and values of tokens that skip a layer, and layers "
            f"{', '.join(map(str, borrowing))} of this {target.decoder.config.model_type} decoder read those of "
            f"earlier layers: route {', '.join(map(str, own)) + ' alone' if own else 'earlier ones'}, by `layers`"
        )


def _check_readable(method: DepthMethod, layers: tuple[int, ...], other: Method, depth: int) -> None:
    """Refuse stages inside the LLM that choose by what a layer does that most image tokens skip."""
    if not isinstance(other, LayerMethod) or other.looks_ahead or method.keeps_all or other.keeps_all:
        return
    for stage in other.stages(depth):
        if stage - 1 in layers:
            free = [layer + 1 for layer in range(depth - 1) if layer not in layers]
            raise UnsupportedError(
                f"{other.name} drops tokens in front of layer {stage} by what layer {stage - 1} shows, which "
                f"{method.name} lets image tokens skip: drop them in front of layer "
                f"{' or '.join(map(str, free)) or 'none'}, or route other layers"
            )


class DepthAction(Action):
    """The routed layers of one prefill.

    entered: hidden states (batch, rows, d) of what went into the layer at hand. weight: (batch, q) what each token of
    the prompt takes of what the layer adds to it, 1 for text; None where all take it as it is.
    """

    def __init__(self, place: DepthPlace, forward: Forward) -> None:
        self.place, self.forward = place, forward
        self.entered: Tensor | None = None
        self.weight: Tensor | None = None

    def _routes(self, index: int) -> bool:
        return self.forward.groups is not None and index in self.place.layers

    def before_layer(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        if not self._routes(index):
            return hidden, kwargs
        forward = self.forward
        if hidden.ndim == 4:
            raise UnsupportedError(
                f"{self.place.method.name} lets tokens skip a layer, and this decoder carries several streams of "
                "hidden states, each of which a layer changes: use a method of another place"
            )
        # Stages of a method inside the LLM are none of this one's business.
        assert forward.groups is not None
        groups = dataclasses.replace(forward.groups, dropped=0)
        rows = forward.streams["self"].rows_of(groups.positions, groups.row)
        states = hidden[groups.row.unsqueeze(1), rows.clamp(min=0)]
        through, weight = self.place.method.select(states, groups, index)
        if self.place.outcome.records:
            method = self.place.method
            scores = method.score(states, groups, index)
            check_scores(method, scores, through.shape)
            self.place.note_scores(forward, method, index, scores)
        if weight is not None:
            self.weight = torch.ones(len(hidden), forward.queries + 1, dtype=hidden.dtype, device=hidden.device)
            # Padding points one past the end.
            at = torch.where(groups.present, groups.positions, forward.queries)
            self.weight[groups.row.unsqueeze(1), at] = weight.to(hidden.dtype)
        going = forward.without(through)
        forward.taken[index] = going if self.weight is None else self.weight[:, :-1] * going
        forward.step_aside(going)
        return hidden, kwargs

    def entering(self, index: int, hidden: Tensor) -> None:
        self.entered = hidden if self.weight is not None else None

    def behind_layer(self, index: int, hidden: Tensor) -> Tensor:
        if not self._routes(index):
            return hidden
        if self.weight is not None and self.entered is not None:
            weight, rows = self.weight[:, :-1].to(hidden.device), self.forward.rows
            weight = weight if rows is None else weight.gather(1, rows.source)
            # At a weight of 1 this is what the layer made, to the last bit.
            hidden = torch.lerp(self.entered.to(hidden.device), hidden, weight.unsqueeze(-1))
            self.entered = self.weight = None
        return self.forward.rejoin(hidden)
