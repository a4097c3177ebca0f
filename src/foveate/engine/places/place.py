"""The protocol of all places: what the session installs, and what then acts in a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...layout import Tile
from ...methods.base import Method
from ..attention import Attention, Output, Run
from ..devices import on
from ..fixtures import Fixtures
from ..forward import Forward
from ..report import Outcome, PruneReport
from ..scores import laid_out
from ..target import Target


@dataclass(frozen=True)
class Call:
    """A call of the base model, before anything is done.

    arguments: by name. brings_images: whether pictures come with it. candidates: guessed tokens at its end, of assisted
    decoding.
    """

    arguments: dict[str, Any]
    brings_images: bool
    candidates: int


class Action:
    """What a place does in one forward pass. Everything is optional; nothing is called in passes it leaves alone."""

    def begin(self) -> None:
        """In front of layer 0 of a prompt with images, once they are found."""

    def before_layer(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """In front of a decoder layer, in passes that bring images; may call `Forward.drop`.

        hidden: (batch, rows, d), what the layer before left. kwargs: the layer's other arguments. Returns both.
        """
        return hidden, kwargs

    def entering(self, index: int, hidden: Tensor) -> None:
        """Behind what was dropped there: hidden states (batch, rows, d) as the layer gets them."""

    def behind_layer(self, index: int, hidden: Tensor) -> Tensor:
        """Behind a decoder layer, in passes that bring images. hidden: (batch, rows, d), what it made; returns them."""
        return hidden

    def attends(self, attention: Attention) -> bool:
        """Whether this action takes part in a layer's attention."""
        return False

    def attend(self, attention: Attention, run: Run) -> Output:
        """Around a layer's attention; `run(attention)` goes on to the kernel."""
        return run(attention)

    def finish(self) -> None:
        """Behind the base model."""

    def image_tokens(self) -> Sequence[Sequence[tuple[Tensor, tuple[Tile, ...]]]]:
        """Per sample the positions and tiles of images that are no part of the prompt, for the report."""
        return ()


class Place:
    """A place on one model where methods act, for as long as the session lasts.

    outcome: what the session tells its user, for places that have something to add.
    """

    def __init__(self, target: Target, outcome: Outcome) -> None:
        self.target, self.outcome = target, outcome

    @classmethod
    def of(cls, target: Target, methods: Sequence[Method], outcome: Outcome) -> Place | None:
        """This place under these methods (those with something to say); None where it has nothing to do."""
        raise NotImplementedError  # every place says itself when it is there

    @classmethod
    def check(cls, target: Target, methods: Sequence[Method]) -> None:
        """Refuse methods that cannot act on this model. methods: all that were asked for.

        Raises:
            UnsupportedError, ValueError: with the way out.
        """

    def install(self, fixtures: Fixtures) -> None:
        """Put on the model what this place needs there, beside the hooks that every session has."""

    def admits(self, call: Call) -> bool:
        """Whether the model is pruned in this call at all."""
        return True

    @property
    def reads_prompt(self) -> bool:
        """Whether what is done here depends on where the prompt ends."""
        return False

    def refuse(self, call: Call) -> None:
        """Raise UnsupportedError for a call that cannot be pruned here."""

    def act(self, forward: Forward) -> Action | None:
        """What this place does in the pass that begins; None where it leaves it alone."""
        return None

    def note_scores(self, forward: Forward, method: Method, index: int, scores: Tensor | None) -> None:
        """For the report: what each candidate counted for when the method chose at a layer, (groups, n) or (groups,
        heads, ..., n); None where it ranks by no number."""
        groups = forward.groups
        if scores is not None and groups is not None:
            at = torch.where(groups.present, groups.positions + forward.past, -1)
            laid = laid_out(scores, *on(scores.device, (at, groups.row)), forward.logical)
            forward.scores.setdefault(method.name, {})[index] = laid

    def tell(self, report: PruneReport) -> None:
        """Add to the report of a prefill."""
