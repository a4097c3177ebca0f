"""What the LLM makes of a prompt's text before it sees the pictures, for methods that choose by the question."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..layout import ImageLayout
from .cache import active
from .fixtures import Fixtures
from .generation import GenerateCall
from .target import Target


class _Asked(threading.local):
    prompt: tuple[Tensor, Tensor | None] | None = None


class Questions:
    """The prompts whose images are about to be encoded: those of the forward at hand, or of `generate()`."""

    def __init__(self, target: Target, method: str) -> None:
        self.target, self.method = target, method
        self._asked = _Asked()

    def install(self, fixtures: Fixtures) -> None:
        """Listen to `generate()`, which encodes images before its first forward."""
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

    def states(self, layouts: Sequence[ImageLayout]) -> Tensor:
        """(images, hidden) the last hidden state of the LLM over the text of each image's prompt alone.

        The text is all that the prompt of this turn holds beside pictures and padding, in order.

        Raises:
            UnsupportedError: where there is no prompt, or no text in one with an image.
        """
        ids, mask = self._prompt()
        is_image = ids.eq(self.target.image_token_id)
        text = ~is_image if mask is None else ~is_image & mask.bool()
        ends = is_image.sum(1).cumsum(0)
        last = torch.tensor([layout.tokens for layout in layouts], device=ids.device).cumsum(0) - 1
        row = torch.searchsorted(ends, last, right=True).clamp(max=len(ids) - 1)
        rows, of = row.unique(return_inverse=True)
        ids, text = ids[rows], text[rows]
        length = text.sum(1)
        shortest, longest = torch.stack([length.min(), length.max()]).tolist()
        if not shortest:
            raise UnsupportedError(
                f"{self.method} chooses by the question, and a sample has none beside its picture: ask one, or use a "
                "method that looks at the picture alone"
            )
        # Behind the text stands what no token of it can see.
        order = text.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
        embeds = self.target.base.get_input_embeddings()(ids.gather(1, order))
        outer, active.forward = active.forward, None
        try:
            hidden = self.target.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        finally:
            active.forward = outer
        return hidden[torch.arange(len(rows), device=ids.device), length - 1][of]

    def _prompt(self) -> tuple[Tensor, Tensor | None]:
        forward = active.forward
        if forward is not None and forward.target is self.target:
            return forward.ids, forward.valid()
        if self._asked.prompt is None:
            raise UnsupportedError(
                f"{self.method} chooses by the question, and these images are encoded without one: call generate() or "
                "the whole model, with pixel values"
            )
        return self._asked.prompt
