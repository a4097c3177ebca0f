"""The forwards of the base model that a session is in."""

from __future__ import annotations

import threading

from torch import Tensor

from .forward import Forward


class Passes(threading.local):
    """Those of one thread, the innermost last; None for one that was refused."""

    def __init__(self) -> None:
        self.entered: list[EnteredPass | None] = []


class EnteredPass:
    """A forward, and how its output is put together.

    prompt: what was made of the prompt, where what stands behind it runs in a pass of its own. unreported: whether it
    is no prefill of the user's, such as one that checks guesses. whole: the pass that all of the prompt would be; it is
    the same where it is no chunk of one.
    """

    def __init__(self, forward: Forward, prompt: Tensor | None, unreported: bool, whole: Forward | None) -> None:
        self.forward, self.prompt = forward, prompt
        self.unreported = unreported or prompt is not None
        self.whole = whole or forward

    @property
    def reports(self) -> bool:
        """Whether a prefill of the user's is over behind it, and no step of decoding."""
        forward, whole = self.forward, self.whole
        ends = forward.past + forward.queries == whole.past + whole.queries
        return ends and not self.unreported and (whole.queries > 1 or not whole.past)
