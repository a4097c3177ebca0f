"""Unlike: keep the image tokens whose features are least like the mean of their picture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity

from foveate.methods import register
from foveate.methods.base import EncoderMethod, EncoderTokens, topk_mask


def unlikeness(features: Tensor) -> Tensor:
    """Cosine distance of each token to the mean of its tile: (tiles, n, hidden) -> (tiles, n), in [0, 2]."""
    features = features.float()  # half precision has few digits for a mean
    return 1 - cosine_similarity(features, features.mean(1, keepdim=True), dim=-1)


@register("unlike")
@dataclass
class Unlike(EncoderMethod):
    """Keep the tokens that stand out from their picture, whatever the question.

    keep: fraction of each image's tokens, or tokens per image.
    """

    summary = "tokens least like the mean of the picture, before the LLM"
    source = "an example of foveate's"
    reads = frozenset({"features"})

    keep: float | int = 0.25

    def score(self, tokens: EncoderTokens) -> Tensor:
        """By what `select` ranks; `foveate show` draws it."""
        assert tokens.features is not None  # since `reads` names it
        return unlikeness(tokens.features)

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        """True for the `budget` most unlike tokens of each tile."""
        return topk_mask(self.score(tokens), budget)
