"""What pruning could leave behind in a model or in transformers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# What transformers itself sets while generating.
VOLATILE = {"rope_deltas"}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return all that a hook, a patch or a mark could change: by identity, so that a copy shows, too."""
    state: dict[str, Any] = {}
    for path, module in model.named_modules():
        state[f"{path}: class"] = id(type(module)), {k: id(v) for k, v in vars(type(module)).items()}
        for key, value in vars(module).items():
            if key not in VOLATILE:
                inside = [id(v) for v in value.values()] if isinstance(value, dict) else None
                state[f"{path}: {key}"] = id(value), inside
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        kind = type(registry)
        state[kind.__name__] = dict(registry._global_mapping), dict(registry._local_mapping)
        state[f"{kind.__name__}: class"] = {k: id(v) for k, v in vars(kind).items()}
    configs = [model.config, *(getattr(model.config, key) for key in model.config.sub_configs)]
    state["configs"] = [(config.to_json_string(), config._attn_implementation) for config in configs]
    state["generation config"] = model.generation_config.to_json_string()
    return state


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
