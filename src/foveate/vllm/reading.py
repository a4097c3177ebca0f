"""What a vision encoder of vLLM shows while it runs: its attention, and what goes into the projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..families.base import Family
from ..layout import ImageLayout
from ..methods.attention import read_attention
from ..methods.base import EncoderMethod
from ..methods.tokens import ATTENTION
from .settings import encoder_depth

_BY_LAYER = ("received", "given", "cls")


class EncoderReading:
    """Listens to the vision encoder of one model, for one method.

    All encoders of vLLM attend through one module, whose inputs are queries and keys after RoPE.
    """

    def __init__(self, model: nn.Module, config: Any, family: Family, method: EncoderMethod) -> None:
        from vllm.model_executor.layers.attention import MMEncoderAttention

        self._model, self._config, self._family = model, config, family
        self._reads = method.reads & ATTENTION
        self._prefix = family.prefix_tokens(config)
        self._listens = False
        self._layers: dict[int, tuple[Tensor, Tensor, Any]] = {}
        self._states: list[Tensor] = []
        if self._reads:
            modules = [module for module in model.modules() if isinstance(module, MMEncoderAttention)]
            numbers = family.readable(config, encoder_depth(config))[-method.vision_layers :]
            for place, number in enumerate(numbers):
                modules[number].register_forward_pre_hook(self._listener(place), with_kwargs=True)
        projector = family.projector(model) if "states" in method.reads else None
        if projector is not None:
            projector.register_forward_pre_hook(self._note_states)

    def __enter__(self) -> EncoderReading:
        self._listens = True
        return self

    def __exit__(self, *error: object) -> None:
        self._listens = False
        self._layers, self._states = {}, []

    def _listener(self, place: int) -> Any:
        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._listens:
                named = dict(zip(("query", "key"), args, strict=False)) | kwargs
                self._layers[place] = named["query"], named["key"], module

        return note

    def _note_states(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._listens:
            self._states.append(args[0])  # some models project picture by picture

    def patches(self, layouts: Sequence[ImageLayout]) -> dict[str, Tensor]:
        """What was read, by name: (all patches, ...), as `select_tokens` takes it. layouts: of what was encoded."""
        layers = [self._attention(*self._layers[place], layouts) for place in sorted(self._layers)]
        read = {name: torch.stack([layer[name] for layer in layers], -1) for name in _BY_LAYER if name in self._reads}
        if "keys" in self._reads:
            read["keys"] = layers[-1]["keys"]
        if self._states:
            read["states"] = torch.cat([self._family.encoder_states(self._model, states) for states in self._states])
        return read

    def _attention(self, query: Tensor, key: Tensor, module: Any, layouts: Sequence[ImageLayout]) -> dict[str, Tensor]:
        """The parts that the method reads of one layer. query, key: (pictures, tokens, ...), or (1, all, ...)."""
        query, key = (
            values.reshape(*values.shape[:2], -1, module.head_size).transpose(1, 2) for values in (query, key)
        )
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        sizes = [query.shape[2]]
        if self._family.side(self._config) is None:  # pictures of any shape stand in one row
            sizes = [tile.patches.numel() for layout in layouts for tile in layout.tiles]
        parts: dict[str, list[Tensor]] = {}
        for q, k in zip(query.split(sizes, 2), key.split(sizes, 2), strict=True):
            for name, value in read_attention(self._reads, q, k, module.scale, self._prefix).items():
                parts.setdefault(name, []).append(value.flatten(0, 1))
        return {name: _mean_of_ranks(torch.cat(values)) for name, values in parts.items()}


def _mean_of_ranks(values: Tensor) -> Tensor:
    """The mean over the heads of all ranks, each of which has as many of its own."""
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

    ranks = get_tensor_model_parallel_world_size()
    return values if ranks == 1 else tensor_model_parallel_all_reduce(values) / ranks
