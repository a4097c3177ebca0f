"""VTC-CLS: keep what the vision encoder's [CLS] token looks at in several layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import register
from .base import EncoderMethod
from .budgets import check_range, topk_mask
from .tokens import EncoderTokens


def ensembled_attention(cls: Tensor) -> Tensor:
    """Sum over layers of the attention that [CLS] pays. (tiles, layers, n) -> float32 (tiles, n)."""
    return cls.float().sum(dim=1)


@register("vtc_cls")
@dataclass
class VTCCLS(EncoderMethod):
    """Keep the tokens to which [CLS] pays most attention, summed over the encoder's last layers.

    The layers are counted back from the penultimate one, since LLaVA takes its features from there; each is
    averaged over heads. With one layer this is FasterVLM's rule. Where an encoder has no [CLS], the attention
    that each patch receives from all patches takes its place; encoders with windows are read in their
    full-attention blocks. Tiled models: every tile is scored separately and gets its share of the image's budget.

    keep: fraction of each image's tokens, or tokens per image; 0.25 is this library's default, the authors
        publish results for 256, 128 and 64 of 576 tokens.
    layers: how many encoder layers vote, at least 1 (fewer where the encoder has fewer that can be read);
        3 is the reported default.

    Source: VTC-CLS, arXiv 2412.05819, and the authors' code, which takes the first layer from the command line.
    Survivors keep their original position ids, the authors' code closes them up.
    """

    summary = "[CLS] attention of several encoder layers ranks tokens before the LLM"
    source = "VTC-CLS, arXiv 2412.05819"
    reads = frozenset({"cls"})

    keep: float | int = 0.25
    layers: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("layers", self.layers, 1, integer=True)

    @property
    def vision_layers(self) -> int:
        return self.layers

    def score(self, tokens: EncoderTokens) -> Tensor:
        assert tokens.cls is not None
        return ensembled_attention(tokens.cls)

    def mass(self, tokens: EncoderTokens) -> Tensor:
        return self.score(tokens)

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        return topk_mask(self.score(tokens), budget)
