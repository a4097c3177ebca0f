"""What `generate()` is about to do: which forwards are its steps, and which tokens of them are guesses."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from .fixtures import Fixtures, NotPickled


@dataclass(frozen=True)
class Step:
    """What is known of the coming forward.

    candidates: guessed tokens at its end, of assisted decoding. verifies: whether it checks guesses. beside: whether it
    is made within `generate()`, but none of the steps that `generate()` prepared.
    """

    candidates: int = 0
    verifies: bool = False
    beside: bool = False


class Steps(NotPickled, threading.local):
    """Listens to the `generate()` of one model, in each thread on its own."""

    generates = False
    _prepared: tuple[Any, bool] | None = None
    _coming = Step()

    def install(self, fixtures: Fixtures, model: Any) -> None:
        """Wrap what `generate()` calls before a step."""
        fixtures.hook(model.register_forward_pre_hook(self._announce, with_kwargs=True))
        fixtures.wrap(model, "generate", self._generate)
        fixtures.wrap(model, "prepare_inputs_for_generation", self._prepare)

    def take(self) -> Step:
        """The step that begins; what was known of it is forgotten."""
        coming, self._coming = self._coming, Step()
        return coming

    def _generate(self, generate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outer, self.generates = self.generates, True
        try:
            return generate(*args, **kwargs)
        finally:
            self.generates = outer

    def _prepare(self, prepare: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # generate() reads the last logits only; assisted decoding asks for more, but after this call.
        if isinstance(kwargs.get("logits_to_keep"), int):
            kwargs["logits_to_keep"] = 1
        inputs = prepare(*args, **kwargs)
        self._prepared = inputs.get("input_ids"), bool(kwargs.get("is_first_iteration", False))
        return inputs

    def _announce(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In front of the model: assisted decoding says only here how many of the coming tokens are guesses."""
        prepared, self._prepared = self._prepared, None
        # A generate() that was aborted in between leaves a note that is of no other forward.
        if prepared is None or prepared[0] is not kwargs.get("input_ids"):
            self._coming = Step(beside=self.generates)
            return
        wanted, first = kwargs.get("logits_to_keep"), prepared[1]
        self._coming = Step(wanted - 1 if isinstance(wanted, int) and wanted > 1 else 0, verifies=not first)
