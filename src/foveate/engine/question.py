"""What the LLM makes of a prompt's text before it sees the pictures, for methods that choose by the question."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..layout import ImageLayout
from .cache import active
from .prompts import Prompts
from .target import Target


class Questions:
    """The questions in the prompts whose images are about to be encoded."""

    def __init__(self, target: Target, prompts: Prompts, method: str) -> None:
        self.target, self.prompts, self.method = target, prompts, method

    def states(self, layouts: Sequence[ImageLayout], medium: str = "image") -> Tensor:
        """(images, hidden) the last hidden state of the LLM over the text of each image's prompt alone.

        The text is all that the prompt of this turn holds beside pictures and padding, in order.

        Raises:
            UnsupportedError: where there is no prompt, or no text in one with an image.
        """
        ids, mask = self._prompt()
        is_image = self.target.is_image(ids)
        text = ~is_image if mask is None else ~is_image & mask.bool()
        ends = ids.eq(self.target.token_ids[medium]).sum(1).cumsum(0)
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
        return hidden.to(ids.device)[torch.arange(len(rows), device=ids.device), length - 1][of]

    def _prompt(self) -> tuple[Tensor, Tensor | None]:
        prompt = self.prompts.here()
        if prompt is None:
            raise UnsupportedError(
                f"{self.method} chooses by the question, and these images are encoded without one: call generate() or "
                "the whole model, with pixel values"
            )
        return prompt
