"""Between transformers and its attention kernels: routing of marked modules, physical masks, and scores."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedError
from .upstream import AttentionInterface

Kernel = Callable[..., tuple[Tensor, Tensor | None]]
Handler = Callable[..., tuple[Tensor, Tensor | None]]

_routes: dict[nn.Module, Handler] = {}
_lock = threading.Lock()
_original: Any = None


def _dispatch(kernel: Kernel, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    handler = _routes.get(module)
    return kernel(module, *args, **kwargs) if handler is None else handler(kernel, module, *args, **kwargs)


def _get_interface(self: AttentionInterface, attn_implementation: str, default: Kernel) -> Kernel:
    return functools.partial(_dispatch, _original(self, attn_implementation, default))


def add_routes(routes: dict[nn.Module, Handler]) -> None:
    """Send the attention of these modules through their handlers, `handler(kernel, module, query, ...)`.

    The lookup of kernels is shadowed while any route exists, instead of any registry entry: names, masks and
    "eager" (which is no entry) keep their meaning, and modules without a route get their kernel unchanged.
    """
    global _original
    if not routes:
        return
    with _lock:
        if any(module in _routes for module in routes):
            raise UnsupportedError("another pruned model shares attention modules with this one; remove() that first")
        if AttentionInterface.get_interface is not _get_interface:
            _original = AttentionInterface.get_interface
            AttentionInterface.get_interface = _get_interface  # type: ignore[method-assign]
        _routes.update(routes)


def remove_routes(modules: Iterable[nn.Module]) -> None:
    """Undo `add_routes`; with the last route the lookup is what it was before the first."""
    with _lock:
        for module in modules:
            _routes.pop(module, None)
        if not _routes and AttentionInterface.get_interface is _get_interface:
            AttentionInterface.get_interface = _original  # type: ignore[method-assign]


def physical_mask(
    implementation: str, queries: int, keys: int, filled: Tensor | None, dtype: torch.dtype, like: Tensor
) -> Tensor | None:
    """The mask of a layer whose slots are in order: causal, aligned at the end, without fillers.

    filled: bool (batch, keys) or None. Returns what the implementation wants: None where it needs no mask, bool
    (batch | 1, 1, queries, keys) for sdpa, additive floats for eager, (batch, keys) for flash attention.
    """
    if "flash" in implementation:
        return filled
    if filled is None and (queries == 1 or (queries == keys and implementation == "sdpa")):
        return None
    visible = None if filled is None else filled[:, None, None, :]
    if queries > 1 or visible is None:
        causal = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)[None, None]
        visible = causal if visible is None else causal & visible
    mask = visible
    if implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=like.device).masked_fill(~mask, torch.finfo(dtype).min)


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
    total = torch.zeros(batch, heads, n, device=query.device)
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
    received = torch.zeros(pictures, n, device=query.device)
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
