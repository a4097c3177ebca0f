"""The prompt that images belong to: `generate()` encodes them before the forward that holds it."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor

from .cache import active
from .fixtures import Fixtures
from .generation import GenerateCall
from .target import Target

Prompt = tuple[Tensor, "Tensor | None"]


class _Asked(threading.local):
    prompt: Prompt | None = None


class Prompts:
    """The prompts whose images are about to be encoded: those of the forward at hand, or of `generate()`."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._asked = _Asked()

    def install(self, fixtures: Fixtures) -> None:
        """Listen to `generate()`."""
        fixtures.wrap(self.target.model, "generate", self._generate)

    def _generate(self, generate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = GenerateCall.read(self.target.model, generate, args, kwargs)
        outer = self._asked.prompt
        if call.brings_images:
            # What the cache holds was asked in earlier turns.
            mask = call.inputs.get("attention_mask")
            self._asked.prompt = call.ids[:, call.past :], None if mask is None else mask[:, call.past :]
        try:
            return generate(*args, **kwargs)
        finally:
            self._asked.prompt = outer

    def here(self) -> Prompt | None:
        """(batch, q) token ids of this turn, and which of them are no padding; None where nobody said."""
        forward = active.forward
        if forward is not None and forward.target is self.target:
            return forward.ids, forward.valid()
        return self._asked.prompt
