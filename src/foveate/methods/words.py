"""The words of a prompt as embeddings, for methods that choose by the question before the LLM runs."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .budgets import check_choice
from .tokens import EncoderTokens

Text = Literal["behind", "all"]


def check_text(text: object) -> None:
    """Raise ValueError unless `text` is one of the choices."""
    check_choice("text", text, ("behind", "all"))


def words_that_count(tokens: EncoderTokens, text: Text) -> tuple[Tensor, Tensor]:
    """Embeddings of the prompt's words, (tiles, m, hidden), and which of them count, bool (tiles, m).

    text: "behind" for those behind the sample's first image, or all where none stands there; "all" for all.
    """
    assert tokens.words is not None and tokens.behind is not None
    counts = tokens.words.any(-1)
    if text == "behind":
        late = counts & tokens.behind
        counts = late.where(late.any(1, keepdim=True), counts)
    return tokens.words, counts
