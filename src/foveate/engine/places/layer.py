"""Inside the LLM: tokens leave in front of a layer, in one or several stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...methods.base import LayerMethod, Method
from ...methods.contract import check_mask, check_scores
from ...methods.tokens import LayerTokens
from ..ahead import look_ahead
from ..attention import Attention, Output, Run
from ..devices import on
from ..forward import Forward
from ..report import Outcome
from ..rows import first_stream, gather_rows
from ..target import Target
from .place import Action, Place


class LayerPlace(Place):
    """The decoder layers in front of which a method drops tokens. stages: these layers, and which stage each is."""

    def __init__(self, target: Target, method: LayerMethod, outcome: Outcome) -> None:
        super().__init__(target, outcome)
        self.method = method
        # A stage stands where a layer can be read: at the next such place, or at the last. Of two in one, the later.
        fits = _readable(target, method)
        asked = method.stages(len(target.kinds))
        self.stages = {next((f for f in fits if f >= layer), fits[-1]): stage for stage, layer in enumerate(asked)}

    @classmethod
    def of(cls, target: Target, methods: Sequence[Method], outcome: Outcome) -> Place | None:
        method = next((m for m in methods if isinstance(m, LayerMethod)), None)
        return None if method is None else cls(target, method, outcome)

    @classmethod
    def check(cls, target: Target, methods: Sequence[Method]) -> None:
        depth = len(target.kinds)
        for method in methods:
            if isinstance(method, LayerMethod):
                stages = method.stages(depth)
                if not stages or list(stages) != sorted(set(stages)) or not 1 <= stages[0] <= stages[-1] < depth:
                    several = f"layers must be ascending and in [1, {depth - 1}]"
                    rule = f"layer must be in [1, {depth - 1}]" if len(stages) == 1 else several
                    raise ValueError(
                        f"{method.name}: {rule} for this model, got {', '.join(map(str, stages)) or 'none'}"
                    )
                if not _readable(target, method):
                    ahead = int(method.looks_ahead)
                    target.check_readable(method.name, range(ahead, depth - 1 + ahead))

    @property
    def reads_prompt(self) -> bool:
        return True

    def act(self, forward: Forward) -> Action | None:
        return LayerAction(self, forward) if forward.brings_images else None


def _readable(target: Target, method: LayerMethod) -> list[int]:
    """The layers in front of which the method finds one to read: the layer itself where it looks ahead, or the one
    before."""
    ahead = int(method.looks_ahead)
    layers = (layer for layer, source in enumerate(target.sources) if layer and source == layer)
    return [layer for layer in layers if target.readable[layer - 1 + ahead]]


class LayerAction(Action):
    """The stages of one prefill."""

    def __init__(self, place: LayerPlace, forward: Forward) -> None:
        self.place, self.forward = place, forward
        self.embedded: Tensor | None = None  # in front of layer 0
        self.entered: Tensor | None = None  # in front of the layer before the stage
        self.view: LayerTokens | None = None  # of that layer

    def _reads(self, index: int) -> bool:
        """Whether the method chooses by what this layer does: the one in front of a stage, unless it looks ahead."""
        at_hand = self.forward.groups is not None and not self.place.method.looks_ahead
        return at_hand and index + 1 in self.place.stages

    def before_layer(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        if self.forward.groups is not None:
            if index == 0 and self.place.method.uses_embeddings:
                self.embedded = first_stream(hidden)
            if index in self.place.stages:
                if self.place.method.looks_ahead:
                    self.view = look_ahead(self.forward, index, hidden, kwargs)
                hidden = self._stage(index, hidden)
        return hidden, kwargs

    def entering(self, index: int, hidden: Tensor) -> None:
        self.entered = first_stream(hidden) if self._reads(index) else None

    def attends(self, attention: Attention) -> bool:
        return self._reads(attention.index)

    def attend(self, attention: Attention, run: Run) -> Output:
        self.view = attention.tokens
        return run(attention)

    def _stage(self, index: int, hidden: Tensor) -> Tensor:
        """Let the method choose which image tokens go on; returns the hidden states they go on with."""
        forward, method = self.forward, self.place.method
        stage = self.place.stages[index]
        view, self.view, groups = self.view, None, forward.groups
        assert view is not None and groups is not None
        embedded = self.embedded
        if embedded is not None and forward.rows is not None:
            embedded = gather_rows(embedded.to(hidden.device), forward.rows.source)
        view = dataclasses.replace(view, entered=self.entered, embedded=embedded, stage=stage, norm=forward.norm)
        tokens = dataclasses.replace(on(hidden.device, view), left=first_stream(hidden))
        chosen = method.select(tokens)
        check_mask(method, chosen, tuple(tokens.groups.present.shape))
        if self.place.outcome.records:
            scores = method.score(tokens)
            check_scores(method, scores, chosen.shape)
            self.place.note_scores(forward, method, index, scores)
        states = method.merge(tokens, chosen)
        if states is not None and hidden.ndim == 4:
            raise UnsupportedError(
                f"{method.name} merges hidden states, of which this decoder carries several streams at once: use a "
                "method inside the LLM that drops tokens"
            )
        if states is not None:
            # Padding points one past the end.
            at = torch.where(chosen, tokens.slots - tokens.past, hidden.shape[1])
            room = torch.nn.functional.pad(hidden, (0, 0, 0, 1))
            room[tokens.groups.row.unsqueeze(1), at] = states.to(hidden.dtype)
            hidden = room[:, :-1]
        forward.drop(forward.without(chosen), stage=True)
        if index == max(self.place.stages):
            self.embedded = None
        return hidden
