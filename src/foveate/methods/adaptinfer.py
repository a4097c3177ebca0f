"""AdaptInfer: the text tokens that the text itself looks at say which image tokens stay, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import register
from .budgets import topk_mask
from .staged import StagedMethod
from .tokens import LayerTokens


def text_prior(attention: Tensor) -> Tensor:
    """How much each text token of a prompt has to do with the others: the column sums of attention among text tokens,
    made the same in both directions.

    attention: (batch, heads, t, t) of text rows on text keys. Returns (batch, heads, t).
    """
    return attention.sum(2) + attention.sum(3) - attention.diagonal(dim1=2, dim2=3)


def text_attention(tokens: LayerTokens, chunk_elements: int = 1 << 24) -> Iterator[tuple[slice, Tensor]]:
    """The attention of the text rows on all keys, some rows at a time: which of `tokens.text`, and (batch, heads, r,
    keys)."""
    batch, heads = tokens.query.shape[:2]
    step = max(1, chunk_elements // (batch * heads * tokens.key.shape[2]))
    for start in range(0, tokens.text.shape[1], step):
        part = slice(start, start + step)
        yield part, tokens.attention(tokens.text[:, part])


@register("adaptinfer")
@dataclass
class AdaptInfer(StagedMethod):
    """At each stage keep the image tokens that the text attends to, each text token weighted, head by head, by how much
    the rest of the text has to do with it.

    The weights are the sums of the attention among the text tokens, from the sample's first image on, in both
    directions; they are taken anew at every stage, in the layer in front of it. Survivors keep their order and position
    ids. Where a sample has several images, each keeps its own share.

    keep: fraction of each image's tokens, or tokens per image, left after the last stage; 0.25 is this library's
        default. The authors' code has counts for 576 tokens: for 128 on average keep=18, earlier=(290, 72), for 64
        keep=3, earlier=(133, 27), and for 48 keep=2, earlier=(80, 24).
    layers: the first layer without the dropped tokens of each stage; None is the default of the authors' code, the
        attention of layers 1, 10 and 20 of 32 (counted from 0; so 2, 11 and 21 here), at the same relative depth.
    earlier: what the stages before the last leave, each of the same kind as `keep`, descending; None for a geometric
        schedule.

    Source: AdaptInfer, arXiv 2508.06084, and the authors' code, whose last stage may keep nothing; here something
    always stays.
    """

    summary = "attention of the text tokens that the text itself looks at drops tokens in stages, inside the LLM"
    source = "AdaptInfer, arXiv 2508.06084"
    published = (2, 11, 21)

    keep: float | int = 0.25

    def score(self, tokens: LayerTokens) -> Tensor:
        """(groups, n) what the weighted text pays to each image token, summed over heads; -inf at padding."""
        text, real = tokens.text, (tokens.text >= 0).unsqueeze(1)
        keys = (text.clamp(min=0) + tokens.past)[:, None, None]
        among = [
            each.gather(3, keys.expand(*each.shape[:3], -1)) * real.unsqueeze(2) for _, each in text_attention(tokens)
        ]
        prior = text_prior(torch.cat(among, 2)) * real
        paid = sum((prior[:, :, part].unsqueeze(2) @ each).sum(1)[:, 0] for part, each in text_attention(tokens))
        assert isinstance(paid, Tensor)
        return tokens.of_images(paid)

    def select(self, tokens: LayerTokens) -> Tensor:
        return topk_mask(self.score(tokens), self.stage_budget(tokens))
