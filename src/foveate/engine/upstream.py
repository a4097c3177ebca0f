"""What the engine stands on inside transformers, and the names that differ between its releases.

Names are read from signatures and outputs, never from version numbers: what a release does counts, not what it is
called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import requires, version
from typing import Any

import torch
from packaging.requirements import Requirement

from ..errors import UnsupportedError

CACHE_NAMES = ("cache", "past_key_values")
"""What a forward, `generate` and outputs call the KV cache: since 5.24, and before."""


def release_note() -> str | None:
    """One sentence where the installed transformers is none that foveate was tested with; None where it is."""
    tested = next(r for r in map(Requirement, requires("foveate") or []) if r.name == "transformers").specifier
    found = version("transformers")
    if tested.contains(found, prereleases=True):
        return None
    return (
        f"foveate was tested with transformers {','.join(sorted(map(str, tested), reverse=True))}, and this is "
        f"{found}: `foveate check` says whether pruning is right with it"
    )


try:
    from transformers import PreTrainedModel, cache_utils
    from transformers.cache_utils import (
        Cache,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        EncoderDecoderCache,
        LinearAttentionLayer,
    )
    from transformers.generation import utils as generation_utils
    from transformers.masking_utils import create_masks_for_generate
    from transformers.modeling_utils import AttentionInterface
except ImportError as error:
    raise ImportError(
        f"this release of transformers lacks what foveate stands on ({error}). {release_note() or ''}".strip()
    ) from error

# Layers of a cache whose decoder layers attend to the entries of earlier ones; older releases just leave them out.
BORROWING_LAYERS: tuple[type, ...] = tuple(
    getattr(cache_utils, name) for name in ("DummyLayer",) if hasattr(cache_utils, name)
)

# Layers of a cache that hold a state in place of entries; those that hold both are none of them.
STATE_LAYERS: tuple[type, ...] = (LinearAttentionLayer,)

# Before 5.24 a prompt that runs in chunks loses its pictures.
SLICES_ENCODED = hasattr(generation_utils, "_slice_mm_encoder_output")

# Layers of a cache without entries of their own.
ENTRYLESS_LAYERS = (*STATE_LAYERS, *BORROWING_LAYERS)

__all__ = [
    "BORROWING_LAYERS",
    "CACHE_NAMES",
    "ENTRYLESS_LAYERS",
    "SLICES_ENCODED",
    "STATE_LAYERS",
    "AttentionInterface",
    "Cache",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "EncoderDecoderCache",
    "PreTrainedModel",
    "cache_behind",
    "cache_in",
    "cache_name",
    "create_masks_for_generate",
    "held_layers",
    "release_note",
    "untraced",
    "without_cache",
]


untraced = torch.compiler.disable
"""Of hooks and all else that is put on a model: where it was compiled, torch runs them between its graphs as they are,
since what they do to a pass differs from one to the next."""


def cache_name(forward: Callable[..., Any]) -> str:
    """The name under which `forward` takes its KV cache.

    Raises:
        UnsupportedError: where it takes none under a name that foveate knows.
    """
    parameters = inspect.signature(forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise UnsupportedError(
        f"{getattr(forward, '__qualname__', forward)} takes no KV cache as {' or '.join(CACHE_NAMES)}, so its cache "
        f"cannot be pruned. {release_note() or 'Use a model whose code is in transformers itself'}"
    )


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a call, in whichever spelling; None where there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call but its KV cache."""
    return {name: value for name, value in arguments.items() if name not in CACHE_NAMES}


def held_layers(cache: Any) -> dict[int, Any]:
    """The layers of a cache that hold keys and values, by index: others hold a state, or read another one's."""
    return {i: layer for i, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None}


def cache_behind(output: Any) -> Any:
    """The KV cache in the output of a forward or of `generate`; None where there is none."""
    # The old name must not be asked for where the new one is known: it warns.
    return getattr(output, "cache", None) if hasattr(output, "cache") else getattr(output, "past_key_values", None)
