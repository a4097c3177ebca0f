"""The four places where vLLM has no hook, each changed once a process and for pruned models only."""

from __future__ import annotations

import functools
from typing import Any

from .settings import PREFIX, SERVED, check_served


def _wrap(owner: Any, name: str, around: Any) -> None:
    """Put `around(original, self, ...)` in the place of a method; done already, it stays as it is."""
    original = getattr(owner, name)
    if hasattr(original, "foveate"):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    wrapped.foveate = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def follow_overrides() -> None:
    """Where "foveate" is among the overrides of a configuration, the pruned architecture takes the place of its own."""
    from vllm.config.model import ModelConfig

    def apply(original: Any, self: Any, config: Any, overrides: dict[str, Any]) -> None:
        original(self, config, overrides)
        if "foveate" not in overrides:
            return
        own = [name.removeprefix(PREFIX) for name in config.architectures or []]
        check_served(own, "this model")
        config.architectures = [PREFIX + name for name in own if name in SERVED]

    _wrap(ModelConfig, "_apply_dict_overrides", apply)


def refuse_overrides(reason: str) -> None:
    """Where "foveate" is among the overrides of a configuration, say why it cannot be."""
    from vllm.config.model import ModelConfig

    def refuse(original: Any, self: Any, config: Any, overrides: dict[str, Any]) -> None:
        if "foveate" in overrides:
            raise ValueError(reason)
        original(self, config, overrides)

    if hasattr(ModelConfig, "_apply_dict_overrides"):
        _wrap(ModelConfig, "_apply_dict_overrides", refuse)


def count_by_lowest() -> None:
    """Profile the encoder with as many pictures as a step may send where all ask for the lowest `keep`."""
    from vllm.multimodal.encoder_budget import MultiModalBudget

    def count(original: Any, self: Any, modality: str, max_tokens_per_item: int) -> Any:
        fewest = getattr(self.processor, "fewest_embeddings", None)
        return original(self, modality, max_tokens_per_item if fewest is None else fewest(modality))

    _wrap(MultiModalBudget, "_get_max_items", count)


def mend_cpu_runner() -> None:
    """On the CPU the first runner forgets to ask whether embeddings bring positions."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.models.interfaces import supports_multimodal_pruning
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def load(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        multimodal = self.model_config.multimodal_config
        enabled = multimodal is not None and multimodal.is_multimodal_pruning_enabled()
        self.is_multimodal_pruning_enabled = enabled and supports_multimodal_pruning(self.get_model())

    _wrap(CPUModelRunner, "load_model", load)
