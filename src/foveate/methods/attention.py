"""Attention maps read in chunks: what tokens receive and give, without ever holding a whole map."""

from __future__ import annotations

from collections.abc import Collection

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
    query: Tensor,
    key: Tensor,
    scaling: float,
    prefix: int,
    chunk_elements: int = 1 << 24,
    sees: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention that each patch receives from, and gives to, the other patches: means over heads and patches.

    query, key: (pictures, heads, prefix + n, d), of a vision encoder; the first `prefix` tokens are no patches.
    sees: bool (pictures | 1, prefix + n, prefix + n), what each token attends to where that is not everything: patches
    of its own picture, no padding. Means are then over these, and what nobody sees, padding, counts for nothing.
    Computed in chunks of query rows. Returns two float32 (pictures, n).
    """
    query = query[:, :, prefix:]
    pictures, heads, n, _ = query.shape
    received = torch.zeros(pictures, n, dtype=torch.float32, device=query.device)
    given = []
    step = max(1, chunk_elements // (pictures * heads * key.shape[2]))
    lookers: Tensor | int = n
    if sees is not None:
        # Padding looks at patches, too.
        sees = sees & sees.any(1, keepdim=True).transpose(1, 2)
        lookers = sees[:, prefix:, prefix:].sum(1).clamp(min=1)
    for start in range(0, n, step):
        logits = ((query[:, :, start : start + step] * scaling) @ key.transpose(-1, -2)).float()
        if sees is None:
            patches = logits.softmax(-1)[..., prefix:].mean(1)
            given.append(patches.mean(-1))
        else:
            seen = sees[:, prefix + start : prefix + start + step]
            weights = logits.masked_fill(~seen.unsqueeze(1), torch.finfo(torch.float32).min).softmax(-1)
            patches = weights[..., prefix:].mean(1) * seen[..., prefix:]
            given.append(patches.sum(-1) / seen[..., prefix:].sum(-1).clamp(min=1))
        received += patches.sum(1)
    return received / lookers, torch.cat(given, dim=1)


def read_attention(
    reads: Collection[str], query: Tensor, key: Tensor, scaling: float, prefix: int, sees: Tensor | None = None
) -> dict[str, Tensor]:
    """What a method reads of a vision encoder layer's attention, by the names of `EncoderTokens`.

    reads: those names; others among them are passed over. query, key, prefix, sees: as for `attention_marginals`.
    Returns (pictures, n) each, but the keys, which are (pictures, n, d).
    """
    read: dict[str, Tensor] = {}
    if "cls" in reads and prefix:
        read["cls"] = prefix_attention(query, key, scaling, prefix, sees)
    if "received" in reads or "given" in reads or ("cls" in reads and not prefix):
        read["received"], read["given"] = attention_marginals(query, key, scaling, prefix, sees=sees)
        read.setdefault("cls", read["received"])
    if "keys" in reads:
        read["keys"] = key[:, :, prefix:].mean(1)
    return {name: value for name, value in read.items() if name in reads}


def prefix_attention(query: Tensor, key: Tensor, scaling: float, prefix: int, sees: Tensor | None = None) -> Tensor:
    """Attention that [CLS], the first token, pays to each patch of a vision encoder, mean over heads.

    query, key, sees: as above. Returns float32 (pictures, n).
    """
    logits = ((query[:, :, :1] * scaling) @ key.transpose(-1, -2)).float()
    if sees is not None:
        logits = logits.masked_fill(~sees[:, None, :1], torch.finfo(torch.float32).min)
    return logits.softmax(-1)[:, :, 0, prefix:].mean(1)
