"""MMTok: keep the tokens that together cover the question's words and the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import register
from .base import EncoderMethod
from .budgets import check_range
from .greedy import LIMIT, covering_first, earliness, first_of
from .tokens import EncoderTokens
from .words import Text, check_text, words_that_count


def coverage(
    features: Tensor,
    states: Tensor,
    words: Tensor,
    counts: Tensor,
    alpha: float,
    word_temperature: float,
    patch_temperature: float,
) -> Tensor:
    """How much each token covers of each word, and of each patch.

    Every row is a softmax of cosines over the tokens: the words' rows divided by their number, the patches' by theirs
    and times `alpha`. features: (tiles, n, hidden), states: (tiles, n, width), words: (tiles, m, hidden); counts: bool
    (tiles, m), words that are none have rows of zeros. Returns float32 (tiles, m + n, n).
    """
    as_seen, as_encoded, asked = (normalize(each.float(), dim=-1) for each in (features, states, words))
    of_words = (asked @ as_seen.transpose(1, 2) / word_temperature).softmax(-1)
    of_words = of_words * (counts / counts.sum(1, keepdim=True).clamp(min=1)).unsqueeze(-1)
    of_patches = (as_encoded @ as_encoded.transpose(1, 2) / patch_temperature).softmax(-1)
    return torch.cat([of_words, of_patches * (alpha / states.shape[1])], 1)


@register("mmtok")
@dataclass
class MMTok(EncoderMethod):
    """Keep the tokens that together cover best what the question says and what the picture shows.

    A word is covered by the token most like it, in cosine between the LLM's embedding of the word and the tokens as the
    LLM will see them; a patch by the token most like it in front of the projector. Both become shares by a softmax over
    the tokens, and the token that adds most coverage is taken, again and again: of the best choice at least 1 - 1/e.
    The LLM does not run for this. Tiled models: every tile is worked on separately with its share of the budget.

    keep: fraction of each image's tokens, or tokens per image; 0.25 is this library's default, that of the other
        methods before the LLM.
    alpha: weight of the patches beside the words, at least 0; 0.5 is the default of the authors' code.
    word_temperature, patch_temperature: of the two softmaxes; 0.02 and 0.2 are the defaults of the authors' code.
    text: which words: "behind" the sample's first image (all where none stands there), or "all" of the prompt. The
        authors' code is handed the question alone; "behind" comes closest without a template.

    Source: MMTok, arXiv 2508.18264, and the authors' code, which takes one sample at a time, splits the question at
    spaces and may reduce it to keywords; here words are the prompt's tokens.
    """

    summary = "greedy coverage of the question's words and of the picture, before the LLM"
    source = "MMTok, arXiv 2508.18264"
    reads = frozenset({"states", "features", "words"})

    keep: float | int = 0.25
    alpha: float = 0.5
    word_temperature: float = 0.02
    patch_temperature: float = 0.2
    text: Text = "behind"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, 0)
        for name in ("word_temperature", "patch_temperature"):
            check_range(name, getattr(self, name), 1e-3)
        check_text(self.text)

    def _order(self, tokens: EncoderTokens) -> Tensor:
        """Tokens as they are picked, as many as any budget asks for: (tiles, steps)."""
        assert tokens.states is not None and tokens.features is not None
        words, counts = words_that_count(tokens, self.text)
        n = tokens.features.shape[1]
        steps, together = min(n, tokens.most or n), max(1, LIMIT // (n * (n + words.shape[1])))
        parts = (each.split(together) for each in (tokens.features, tokens.states, words, counts))
        temperatures, orders = (self.word_temperature, self.patch_temperature), []
        for features, states, asked, spoken in zip(*parts, strict=True):
            table = coverage(features, states, asked, spoken, self.alpha, *temperatures)
            orders.append(covering_first(table, torch.ones_like(table[:, 0]), steps))
        return torch.cat(orders)

    def score(self, tokens: EncoderTokens) -> Tensor:
        return earliness(self._order(tokens), tokens.grid[0] * tokens.grid[1])

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        return first_of(self._order(tokens), budget, tokens.grid[0] * tokens.grid[1])
