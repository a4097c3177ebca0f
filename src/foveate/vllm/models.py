"""vLLM's model classes with pruning in front of them, each built when vLLM first asks for it by name."""

from __future__ import annotations

import functools
from typing import Any

from .settings import PREFIX, SERVED


def __getattr__(name: str) -> Any:
    architecture = name.removeprefix(PREFIX).partition("_on_")[0]
    if not name.startswith(PREFIX) or architecture not in SERVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _build(architecture)


@functools.cache
def _build(architecture: str) -> type:
    from vllm import ModelRegistry
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from .model import PrunedModel
    from .processor import PrunedProcessor, pruned_info

    stock: Any = ModelRegistry._try_load_model_cls(architecture)
    factories = stock._processor_factory
    model = type(PREFIX + architecture, (PrunedModel, stock), {"__module__": __name__})

    def processor(info: Any, dummy_inputs: Any) -> Any:
        # Some factories are functions that choose a class; what they return says which.
        kind = type(factories.processor(info, dummy_inputs))
        return type(PREFIX + kind.__name__, (PrunedProcessor, kind), {})(info, dummy_inputs)

    register = MULTIMODAL_REGISTRY.register_processor(
        processor, info=lambda ctx: pruned_info(factories.info(ctx)), dummy_inputs=factories.dummy_inputs
    )
    return register(model)
