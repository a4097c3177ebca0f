"""Trimmed-Llama: the image features that no head of the first cross-attention layer wants are dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import register
from .base import CrossMethod
from .budgets import topk_mask


def union_of_heads(attention: Tensor, valid: Tensor, k: Tensor) -> Tensor:
    """The union over heads of each head's top `k` features.

    attention: (batch, heads, n); valid: bool (batch, n); k: (batch,). Returns bool (batch, n).
    """
    scores = attention.masked_fill(~valid.unsqueeze(1), -torch.inf)
    return topk_mask(scores, k.unsqueeze(-1).expand(scores.shape[:-1])).any(dim=1)


@register("trimmed_llama")
@dataclass
class TrimmedLlama(CrossMethod):
    """Keep the union of every head's favourite image features, chosen in the first cross-attention layer.

    Each query head ranks the features of the sample's images by the attention they receive from all text rows
    (sum over rows) and picks its top `floor(keep * n)`; what any head picked stays. Later cross-attention layers
    compute and cache keys and values only for those; the first layer's own cache is trimmed once its attention
    is done. Padded tiles never win. More heads make a larger union, so the share that stays exceeds `keep` and
    adapts to the question.

    keep: K_ratio of the paper, per head: a fraction of the sample's valid features, or features per image;
        0.25 is this library's default: near-parity is reported there on the 11-billion-parameter model. The
        features of all images of a sample are ranked together, so an image may lose every one of them.

    Source: Trimmed-Llama, arXiv 2504.00557 (place and union from the abstract and the authors' article; the sum
    over text rows and the use of query heads are inferred from the published counts, since no code is public).
    """

    summary = "union of each head's top image features in the first cross-attention layer"
    source = "Trimmed-Llama, arXiv 2504.00557"

    keep: float | int = 0.25

    def score(self, attention: Tensor, valid: Tensor) -> Tensor:
        return attention

    def select(self, attention: Tensor, valid: Tensor, images: Tensor) -> Tensor:
        return union_of_heads(attention, valid, self.budget(valid, images))
