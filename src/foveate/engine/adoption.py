"""The caches that come: whether their entries can be evicted, and pruned layers in place of theirs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .cache import PrunedLayer
from .upstream import (
    ENTRYLESS_LAYERS,
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

DEFAULT_CACHE = (
    "use the default dynamic cache (no cache_implementation, no cache of another kind, no continuous batching)"
)


def unfit(cache: Any) -> str | None:
    """Why entries of a cache cannot be evicted, as the end of a sentence; None where they can."""
    if cache.offloading:
        return "an offloaded cache: its entries live elsewhere"
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, PrunedLayer, *ENTRYLESS_LAYERS):
            return f"a cache of {type(layer).__name__}s"
    if not cache.layers and cache.layer_class_to_replicate is not DynamicLayer:
        return f"this {type(cache).__name__}"
    return None


def check_cache(cache: Any) -> None:
    """Raise UnsupportedError for a cache that no method can do with."""
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise UnsupportedError(f"foveate cannot prune a {type(cache).__name__}; {DEFAULT_CACHE}")


def check_evicts(cache: Any) -> None:
    """Raise UnsupportedError for a cache whose entries cannot be evicted."""
    check_cache(cache)
    if why := unfit(cache):
        raise UnsupportedError(
            f"foveate cannot evict from {why}. Methods before the LLM work with it, since what they drop never gets "
            f"there (`foveate methods` says which they are); for others {DEFAULT_CACHE}"
        )


def adopt_cache(cache: Any, kinds: list[Literal["self", "cross", "state"]]) -> None:
    """Swap pruned layers into `cache` in place; what the layers hold stays. Layers that hold nothing stay, too."""
    grows, shared = cache.layer_class_to_replicate is not None, None
    for i, kind in enumerate(kinds):
        if i == len(cache.layers):
            if not grows:
                break  # the layers from here on read the entries of earlier ones
            cache.layers.append(PrunedLayer("cross" if kind == "cross" else "self"))
        elif type(cache.layers[i]) in ENTRYLESS_LAYERS:
            continue
        elif not isinstance(cache.layers[i], PrunedLayer):
            cache.layers[i] = PrunedLayer.adopt(cache.layers[i], "cross" if kind == "cross" else "self")
        shared = cache.layers[i].shared if shared is None else shared
        cache.layers[i].shared = shared


def evict_hidden(cache: Any, mask: Tensor) -> None:
    """Free entries of pruned layers that a 2-D mask hides, so that what is held is always attended to.

    mask: bool (batch, tokens).
    """
    for layer in (layer for layer in cache.layers if isinstance(layer, PrunedLayer)):
        if layer.kind == "self" and layer.index is not None:
            index = layer.full_index(mask.shape[0], mask.device)
            hidden = mask.to(index.device).unsqueeze(1).expand(-1, index.shape[1], -1)
            known = torch.nn.functional.pad(hidden, (0, max(0, layer.length - hidden.shape[-1])), value=True)
            layer.keep(known.gather(-1, index.clamp(min=0)) & (index >= 0))


def new_cache(config: Any) -> Cache:
    """The cache that the decoder would make for itself."""
    return DynamicCache(config=config)
