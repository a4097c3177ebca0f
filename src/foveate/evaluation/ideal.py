"""The ideal that a method is measured against: the untouched model with only as many tokens in each layer.

Nothing is chosen, scored or gathered here: spans of the image are left out, the same in every sample. What such
a model answers has no meaning; how fast it is, no method with these numbers of tokens can beat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.upstream import cache_in

# Where methods act that keep tokens from being computed; all others let every token through all layers of the prefill.
SHORTENS = frozenset({"encoder", "layer", "depth", "cross"})


@dataclass(frozen=True)
class Plan:
    """How many tokens each decoder layer has.

    kinds: "self", "cross" or "state". length: tokens of the prompt, the longest sample's. start: where its image begins
    in every sample. features: image features that cross-attention layers read. computed: tokens that each layer
    computes in the prefill (cross layers: features they read). held: entries of its cache behind the prefill, or
    of those what a step of decoding reads, where steps choose.
    """

    kinds: tuple[str, ...]
    length: int
    start: int
    features: int
    computed: tuple[int, ...]
    held: tuple[int, ...]

    @classmethod
    def of(cls, report: Any, places: Sequence[str], start: int, through: Any = None) -> Plan:
        """What methods left. report: of a run with `record=True`. places: where they act. through: the same of those
        alone that shorten the prefill (see `SHORTENS`), where there are others beside them.
        """
        layers = report.layers
        # The report of a second run beside the model says nothing of the first.
        all_held = set(places) == {"logits"}
        if SHORTENS.isdisjoint(places):
            seen = [layer.length for layer in layers]
        else:
            seen = [int(layer.seen.sum(-1).max()) for layer in (through or report).layers]
        length = next(layer.length for layer in layers if layer.kind == "self")
        features = next((layer.length for layer in layers if layer.kind == "cross"), 0)
        held = [layer.length if all_held else layer.kept_length for layer in layers]
        if report.decoding is not None and report.decoding.chosen:
            for index, chosen in report.decoding.chosen[0].items():
                held[index] = int(chosen.sum(-1).max()) - 1  # of the step itself
        return cls(tuple(layer.kind for layer in layers), length, start, features, tuple(seen), tuple(held))

    def _full(self, layer: int) -> int:
        return self.features if self.kinds[layer] == "cross" else self.length

    @property
    def shortens_prefill(self) -> bool:
        """Whether any layer computes less than the untouched model's."""
        return any(n < self._full(i) for i, n in enumerate(self.computed))

    @property
    def shortens_cache(self) -> bool:
        """Whether any layer holds less than the untouched model's."""
        return any(n < self._full(i) for i, n in enumerate(self.held))


@contextmanager
def ideal(family: Any, base: Any, plan: Plan) -> Iterator[None]:
    """Let an untouched model run with so many tokens, inside the block, through its own `generate()`."""
    shortened, decoder = _Shortened(plan), family.decoder(base)
    handles = [
        decoder.register_forward_pre_hook(shortened.enter, with_kwargs=True),
        decoder.register_forward_hook(shortened.leave, with_kwargs=True),
    ]
    for i, layer in enumerate(decoder.layers):
        if layer_hook := shortened.hook(i):
            handles.append(layer.register_forward_pre_hook(layer_hook, with_kwargs=True))
    if family.deepstack is not None:
        setattr(decoder, family.deepstack, shortened.add(getattr(decoder, family.deepstack)))
    try:
        yield
    finally:
        if family.deepstack is not None:
            delattr(decoder, family.deepstack)
        for handle in handles:
            handle.remove()


class _Shortened:
    """The hooks. Per layer there are only those that the plan needs."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.first = plan.kinds.index("self")
        self.prefill = False
        self.cache: Any = None
        self.fitted: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def fit(self, x: Tensor, dim: int, size: int, start: int) -> Tensor:
        """Leave a span behind `start` out of a dimension, or repeat it; once for all layers that ask."""
        extra = size - x.shape[dim]
        if not extra:
            return x
        key = (id(x), dim, size)
        if key not in self.fitted:
            if extra > 0:
                more = x.narrow(dim, start, 1).expand(*(extra if d == dim % x.ndim else -1 for d in range(x.ndim)))
                parts = [x.narrow(dim, 0, start), more, x.narrow(dim, start, x.shape[dim] - start)]
            else:
                parts = [x.narrow(dim, 0, start), x.narrow(dim, start - extra, size - start)]
            self.fitted[key] = (x, parts[-1] if not start and extra < 0 else torch.cat(parts, dim))
        return self.fitted[key][1]

    def enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """In front of the language model."""
        start = self.plan.start
        embeds, ids, mask = kwargs.get("inputs_embeds"), kwargs.get("input_ids"), kwargs.get("attention_mask")
        self.cache = cache_in(kwargs)
        self.fitted.clear()
        width = next(tensor.shape[1] for tensor in (embeds, ids) if tensor is not None)
        self.prefill = width > 1
        if self.prefill:
            length, width = width, self.plan.computed[self.first]
            for name, value in kwargs.items():  # whatever comes token by token
                by_token = isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == length
                if by_token and name not in ("attention_mask", "position_ids"):
                    kwargs[name] = self.fit(value, 1, width, start)
            if kwargs.get("position_ids") is not None:
                # Without a gap, which flash attention would take for the border of packed sequences.
                kwargs["position_ids"] = kwargs["position_ids"][..., :width]
        if isinstance(mask, dict):  # one for each kind of layer
            kwargs["attention_mask"] = {kind: self.rows(each, width) for kind, each in mask.items()}
        elif mask is not None and mask.ndim == 4:
            kwargs["attention_mask"] = self.rows(mask, width)
        elif mask is not None and mask.ndim == 2:
            kwargs["attention_mask"] = self.fit(mask, 1, self.cache.get_seq_length() + width, start)
        return args, kwargs

    def rows(self, mask: Tensor | None, width: int) -> Tensor | None:
        """A mask (b, 1, q, kv) of the model's own, for a prefill with so many tokens; in steps it knows the cache."""
        if mask is None or not self.prefill:
            return mask
        return self.fit(self.fit(mask, 3, width, self.plan.start), 2, width, self.plan.start)

    def add(self, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The decoder's own method that adds features to image tokens, for as many of them as there are."""

        def fewer(hidden: Tensor, where: Tensor, features: Tensor) -> Tensor:
            where = self.fit(where, 1, hidden.shape[1], self.plan.start)
            return method(hidden, where, features[: int(where.sum())])

        return fewer

    def hook(self, index: int) -> Any:
        """The hook in front of a decoder layer, None where it has nothing to do."""
        plan = self.plan
        if plan.kinds[index] == "cross":
            return self._cross(index) if plan.held[index] < plan.features else None
        first = self.first
        before = next((plan.computed[i] for i in range(index - 1, first, -1) if plan.kinds[i] != "cross"), None)
        alike = (plan.computed[index], plan.held[index]) == (plan.computed[first], plan.held[first])
        # What comes from a shorter layer must grow again.
        return None if alike and before in (None, plan.computed[index]) else self._self(index)

    def _self(self, index: int) -> Any:
        computed, start = self.plan.computed[index], self.plan.start

        def shorten(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask, (hidden, *rest) = kwargs.get("attention_mask"), args
            if not self.prefill and (mask is None or self.plan.kinds[index] == "state"):
                return None
            if self.prefill:
                hidden, *rest = (self.fit(x, 1, computed, start) if isinstance(x, Tensor) else x for x in args)
                parts = kwargs["position_embeddings"]
                kwargs["position_embeddings"] = tuple(self.fit(part, 1, computed, start) for part in parts)
                if kwargs.get("position_ids") is not None:
                    kwargs["position_ids"] = kwargs["position_ids"][..., :computed]
            if mask is not None:
                # A layer with a window holds fewer tokens than it has seen.
                keys = computed if self.prefill else self.cache.layers[index].keys.shape[2] + hidden.shape[1]
                mask = self.fit(mask, mask.ndim - 1, keys, start)
                kwargs["attention_mask"] = self.fit(mask, 2, hidden.shape[1], start) if mask.ndim == 4 else mask
            return (hidden, *rest), kwargs

        return shorten

    def _cross(self, index: int) -> Any:
        def shorten(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            states, mask = kwargs.get("cross_attention_states"), kwargs.get("cross_attention_mask")
            size = self.plan.held[index] if states is None else self.plan.computed[index]
            if states is not None:
                states = states.reshape(args[0].shape[0], -1, states.shape[-1])
                kwargs["cross_attention_states"] = states[:, :size]
            if mask is not None:
                kwargs["cross_attention_mask"] = self.fit(mask, 3, size, 0)
            return args, kwargs

        return shorten

    def leave(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Behind the language model: shorten what methods would have evicted."""
        if self.prefill:
            for layer, size in zip(self.cache.layers, self.plan.held, strict=True):
                if not hasattr(layer, "keys"):  # it carries a state
                    continue
                held = [t[:, :, -size:] for t in (layer.keys, layer.values)]
                # Those behind a window are a view, too, of all that was computed.
                if held[0].untyped_storage().nbytes() > held[0].nbytes:
                    layer.keys, layer.values = (t.clone() for t in held)
