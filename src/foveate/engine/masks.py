"""Masks over physical slots: the plain causal one, and those that a model makes for itself (windows, blocks)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .rows import gather_rows

FLASH_HEADS = (
    'flash attention takes no mask for each head: load the model with attn_implementation="sdpa", or use a method that '
    "keeps equally many in all heads"
)


def physical_mask(
    implementation: str, queries: int, keys: int, filled: Tensor | None, dtype: torch.dtype, like: Tensor
) -> Tensor | None:
    """The mask of a layer whose slots are in order: causal, aligned at the end, without fillers.

    filled: bool (batch, 1 | kv_heads, keys) or None. like: the queries, (batch, heads, queries, d). Returns what the
    implementation wants: None where it needs no mask, bool (batch | 1, heads | 1, queries, keys) for sdpa, additive
    floats for eager, (batch, keys) for flash attention.

    Raises:
        UnsupportedError: for flash attention where heads have fillers of their own, which it has no mask for.
    """
    if "flash" in implementation:
        if filled is not None and filled.shape[1] > 1:
            raise UnsupportedError(f"the heads of this KV cache keep differently many tokens, and {FLASH_HEADS}")
        return None if filled is None else filled[:, 0]
    if filled is None and (queries == 1 or (queries == keys and implementation == "sdpa")):
        return None
    visible = None if filled is None else of_queries(filled, like.shape[1]).unsqueeze(2)
    if queries > 1 or visible is None:
        causal = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)[None, None]
        visible = causal if visible is None else causal & visible
    mask = visible
    if implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=like.device).masked_fill(~mask, torch.finfo(dtype).min)


def of_queries(keys: Tensor, heads: int) -> Tensor:
    """What is said of the keys of each KV head, (batch, 1 | kv_heads, slots), as the query heads that share one have
    it: (batch, 1 | heads, slots)."""
    return keys if keys.shape[1] == 1 else keys.repeat_interleave(heads // keys.shape[1], dim=1)


def says_more(mask: Tensor, real: Tensor | None, total: int) -> bool:
    """Whether a model's own mask lets tokens see less or more than what is real and not behind them.

    mask: (batch | 1, heads | 1, queries, keys), bool or additive, its last column the last query's. real: bool (batch,
    total), False at padding, whose rows do not count; None where all are tokens. total: tokens up to the last query.
    One device synchronisation.
    """
    queries, keys = mask.shape[-2:]
    if keys != total:  # a window left some behind
        return True
    causal = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    plain = causal if real is None else causal & real[:, None, None, :]
    if mask.dtype == torch.bool:
        differs = mask != plain
    else:
        differs = (mask != 0).where(plain, mask > torch.finfo(mask.dtype).min / 2)
    if real is not None:
        differs = differs & real[:, None, keys - queries :, None]
    return bool(differs.any())


def gather_mask(mask: Tensor, rows: Tensor | None, keys: Tensor, end: int, heads: int) -> Tensor:
    """What a model's own mask says of the rows that are computed and the keys that are held.

    mask: (batch | 1, heads | 1, queries, columns), bool or additive, over logical positions up to `end`. rows: (batch,
    r) which of the queries, None for all. keys: (batch, kv_heads | 1, slots) the logical position of each key, -1 for
    a filler; one behind `end` holds nothing yet. Returns (batch, heads | 1, r, slots).
    """
    mask = mask.expand(keys.shape[0], -1, -1, -1)
    if rows is not None:
        mask = gather_rows(mask.transpose(1, 2).flatten(2), rows).unflatten(2, (mask.shape[1], -1)).transpose(1, 2)
    columns = of_queries(keys, heads) - (end - mask.shape[-1])
    seen = (columns >= 0) & (columns < mask.shape[-1])
    shape = torch.broadcast_shapes(mask.shape[:2], columns.shape[:2])
    within = columns.clamp(0, mask.shape[-1] - 1).expand(*shape, -1).unsqueeze(2)
    found = mask.expand(*shape, -1, -1).gather(3, within.expand(-1, -1, mask.shape[2], -1))
    # What stands in front of the first column is behind the window; fillers do, too. Behind the last nothing is yet.
    return found.masked_fill(~seen.unsqueeze(2), hidden_in(mask))


def hidden_in(mask: Tensor) -> float:
    """What a mask says of a key that must not be seen."""
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def causal_over(rows: Tensor, keys: Tensor) -> Tensor:
    """bool (batch | 1, 1, r, slots): each row sees the keys that are not behind it.

    rows: (batch | 1, r) positions. keys: (batch | 1, slots) positions, -1 for a filler.
    """
    keys = keys[:, None, None, :]
    return (keys >= 0) & (keys <= rows[:, None, :, None])
