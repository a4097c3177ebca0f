"""What the LLM makes of a prompt's text before it sees the pictures, for methods that choose by the question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..layout import ImageLayout
from .cache import active
from .prompts import Prompts
from .target import Target


class _Asked(NamedTuple):
    """The texts of the prompts that have images, each once.

    embeds: (prompts, m, hidden), other tokens behind a shorter text. length: (prompts,). behind: bool (prompts, m),
    what stands behind the start of a prompt's first image. of: (images,) whose text each image's is.
    """

    embeds: Tensor
    length: Tensor
    behind: Tensor
    of: Tensor


class Questions:
    """The questions in the prompts whose images are about to be encoded: all text that a prompt of this turn holds
    beside pictures and padding, in order."""

    def __init__(self, target: Target, prompts: Prompts, method: str) -> None:
        self.target, self.prompts, self.method = target, prompts, method

    def states(self, layouts: Sequence[ImageLayout], medium: str = "image") -> Tensor:
        """(images, hidden) the last hidden state of the LLM over the text of each image's prompt alone.

        Raises:
            UnsupportedError: where there is no prompt, or no text in one with an image.
        """
        asked = self._asked(layouts, medium)
        outer, active.forward = active.forward, None
        try:
            # Behind the text stands what no token of it can see.
            hidden = self.target.decoder(inputs_embeds=asked.embeds, use_cache=False).last_hidden_state
        finally:
            active.forward = outer
        rows = torch.arange(len(hidden), device=asked.of.device)
        return hidden.to(asked.of.device)[rows, asked.length - 1][asked.of]

    def words(self, layouts: Sequence[ImageLayout], medium: str = "image") -> tuple[Tensor, Tensor]:
        """The embeddings of the text of each image's prompt, (images, m, hidden), zeros behind a shorter one; and bool
        (images, m), the words behind the start of the prompt's first image.

        Raises:
            UnsupportedError: where there is no prompt, or no text in one with an image.
        """
        asked = self._asked(layouts, medium)
        real = torch.arange(asked.behind.shape[1], device=asked.of.device) < asked.length.unsqueeze(1)
        words = asked.embeds.masked_fill(~real.to(asked.embeds.device).unsqueeze(-1), 0)
        return words[asked.of.to(words.device)], (asked.behind & real)[asked.of]

    def _asked(self, layouts: Sequence[ImageLayout], medium: str) -> _Asked:
        ids, mask = self._prompt()
        is_image = self.target.is_image(ids)
        text = ~is_image if mask is None else ~is_image & mask.bool()
        ends = ids.eq(self.target.token_ids[medium]).sum(1).cumsum(0)
        last = torch.tensor([layout.tokens for layout in layouts], device=ids.device).cumsum(0) - 1
        row = torch.searchsorted(ends, last, right=True).clamp(max=len(ids) - 1)
        rows, of = row.unique(return_inverse=True)
        ids, text, behind = ids[rows], text[rows], is_image[rows].cumsum(1) > 0
        length = text.sum(1)
        shortest, longest = torch.stack([length.min(), length.max()]).tolist()
        if not shortest:
            raise UnsupportedError(
                f"{self.method} chooses by the question, and a sample has none beside its picture: ask one, or use a "
                "method that looks at the picture alone"
            )
        order = text.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
        embeds = self.target.base.get_input_embeddings()(ids.gather(1, order))
        return _Asked(embeds, length, behind.gather(1, order), of)

    def _prompt(self) -> tuple[Tensor, Tensor | None]:
        prompt = self.prompts.here()
        if prompt is None:
            raise UnsupportedError(
                f"{self.method} chooses by the question, and these images are encoded without one: call generate() or "
                "the whole model, with pixel values"
            )
        return prompt
