"""Plain material for the maths tests: slow, obvious forms, and inputs built by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.methods.tokens import ImageGroups, LayerTokens


def slow_topk(values: list[float], k: int) -> list[bool]:
    """The `k` largest; among equals the earlier."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return [i in order[:k] for i in range(len(values))]


def slow_map(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """(heads, q, n) attention of one sample, head by head."""
    rows = []
    for head in range(query.shape[0]):
        logits = query[head] @ key[head * key.shape[0] // query.shape[0]].T * scaling
        rows.append((logits if mask is None else logits + mask).softmax(-1))
    return torch.stack(rows)


def groups_of(counts: list[int], pinned: list[int] | None = None) -> ImageGroups:
    """One image a sample, its tokens first."""
    width = max(counts)
    positions = torch.tensor([[i if i < n else -1 for i in range(width)] for n in counts])
    return ImageGroups(
        positions, torch.arange(len(counts)), torch.tensor(counts), torch.tensor(pinned or [0] * len(counts))
    )


def layer_tokens(query: Tensor, key: Tensor, scaling: float, visible: Tensor | None = None) -> LayerTokens:
    """A layer whose every key but the last is a token of one image, and whose last row is the question."""
    batch, keys = key.shape[0], key.shape[2]
    last = torch.full((batch,), query.shape[2] - 1)
    groups = groups_of([keys - 1] * batch)
    return LayerTokens(groups, groups.positions, query, key, scaling, visible, last, last.unsqueeze(1))
