"""Attention maps read in chunks: what tokens receive and give, without ever holding a whole map."""

from __future__ import annotations

import torch
from torch import Tensor


def received_by_features(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor | None,
    rows: Tensor,
    chunk_elements: int = 1 << 24,
) -> tuple[Tensor, Tensor]:
    """What each cross-attended feature receives from the text, computed in chunks of text rows.

    query: (batch, heads, q, d); key: (batch, kv_heads, n, d); mask: additive (batch, 1, q, n) or None; rows: bool
    (batch, q), the text rows that count. Returns float32 (batch, heads, n), the sum over rows, and bool (batch, n),
    the features that any row may see.
    """
    batch, heads, q, dim = query.shape
    n = key.shape[2]
    grouped = query.reshape(batch, key.shape[1], -1, q, dim)
    total = torch.zeros(batch, heads, n, dtype=torch.float32, device=query.device)
    seen = torch.zeros(batch, n, dtype=torch.bool, device=query.device)
    step = max(1, chunk_elements // (batch * heads * n))
    for start in range(0, q, step):
        part = slice(start, start + step)
        counts = rows[:, part]
        logits = ((grouped[..., part, :] * scaling) @ key.transpose(-1, -2)[:, :, None]).float()
        if mask is None:
            seen |= counts.any(1, keepdim=True)
        else:
            logits = logits + mask[:, :, None, part].float()
            seen |= ((mask[:, 0, part] == 0) & counts.unsqueeze(-1)).any(1)
        weights = logits.softmax(-1) * counts[:, None, None, :, None]
        total += weights.sum(-2).reshape(batch, heads, n)
    return total, seen


def attention_marginals(
    query: Tensor, key: Tensor, scaling: float, prefix: int, chunk_elements: int = 1 << 24
) -> tuple[Tensor, Tensor]:
    """Attention that each patch receives from, and gives to, the other patches: means over heads and patches.

    query, key: (pictures, heads, prefix + n, d), of a vision encoder; the first `prefix` tokens are no patches.
    Computed in chunks of query rows. Returns two float32 (pictures, n).
    """
    query = query[:, :, prefix:]
    pictures, heads, n, _ = query.shape
    received = torch.zeros(pictures, n, dtype=torch.float32, device=query.device)
    given = []
    step = max(1, chunk_elements // (pictures * heads * key.shape[2]))
    for start in range(0, n, step):
        weights = ((query[:, :, start : start + step] * scaling) @ key.transpose(-1, -2)).float().softmax(-1)
        patches = weights[..., prefix:].mean(1)
        received += patches.sum(1)
        given.append(patches.mean(-1))
    return received / n, torch.cat(given, dim=1)


def prefix_attention(query: Tensor, key: Tensor, scaling: float, prefix: int) -> Tensor:
    """Attention that [CLS], the first token, pays to each patch of a vision encoder, mean over heads.

    query, key: (pictures, heads, prefix + n, d). Returns float32 (pictures, n).
    """
    weights = ((query[:, :, :1] * scaling) @ key.transpose(-1, -2)).float().softmax(-1)
    return weights[:, :, 0, prefix:].mean(1)
