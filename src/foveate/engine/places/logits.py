"""Two views of one prompt: the model as `generate()` runs it, and beside it the same model on fewer image tokens."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ...errors import UnsupportedError
from ...methods.base import ContrastMethod, Method
from ..adoption import check_evicts, new_cache
from ..fixtures import Fixtures
from ..generation import GenerateCall
from ..report import Outcome, PruneReport
from ..target import Target
from ..upstream import cache_name, untraced, without_cache
from .place import Call, Place

# Modes that show the processor other tokens than those of the forward before it, or run the model in between.
_NOT_STEP_BY_STEP = (
    "assistant_model", "prompt_lookup_num_tokens", "custom_generate", "prefill_chunk_size", "guidance_scale"
)  # fmt: skip


class _Running(threading.local):
    views: _Views | None = None
    reduced = False


class LogitsPlace(Place):
    """The steps of `generate()`: the session prunes the runs of the second view only."""

    def __init__(self, target: Target, method: ContrastMethod, outcome: Outcome) -> None:
        super().__init__(target, outcome)
        self.method = method
        self._running = _Running()

    @classmethod
    def of(cls, target: Target, methods: Sequence[Method], outcome: Outcome) -> Place | None:
        method = next((m for m in methods if isinstance(m, ContrastMethod)), None)
        return None if method is None else cls(target, method, outcome)

    @classmethod
    def check(cls, target: Target, methods: Sequence[Method]) -> None:
        for method in methods:
            if isinstance(method, ContrastMethod) and len(methods) > 1:
                raise UnsupportedError(f"{method.name} compares with the untouched model: use it without other methods")

    def install(self, fixtures: Fixtures) -> None:
        fixtures.wrap(self.target.model, "generate", self.generate)
        fixtures.hook(self.target.model.register_forward_pre_hook(self._note, with_kwargs=True))

    def admits(self, call: Call) -> bool:
        """The full view runs as it is."""
        if self.reduced:
            return True
        if call.brings_images and self._running.views is None:
            raise UnsupportedError(
                f"{self.method.name} acts on the steps of generate(): call that, or run the model outside the pruned "
                "block"
            )
        return False

    def tell(self, report: PruneReport) -> None:
        """The cache of the full view is held beside that of the reduced one."""
        report.kv_bytes += report.kv_bytes_unpruned

    @property
    def reduced(self) -> bool:
        """Whether this thread is in a run of the reduced view."""
        return self._running.reduced

    def generate(self, generate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's `generate` with a logits processor that contrasts the two views."""
        call = GenerateCall.read(self.target.model, generate, args, kwargs)
        if not call.brings_images:
            return generate(*args, **kwargs)
        name = self.method.name
        if modes := call.asks(_NOT_STEP_BY_STEP):
            raise UnsupportedError(f"{name} contrasts one forward pass a step: generate without {', '.join(modes)}")
        if call.config.use_cache is False or call.config.cache_implementation not in (None, "dynamic"):
            raise UnsupportedError(f"{name} needs the default dynamic cache: generate with use_cache=True and no other")
        if call.past:
            raise UnsupportedError(
                f"{name} has only one view's entries in this KV cache: pass the whole conversation without a cache"
            )
        if call.cache is not None:
            check_evicts(call.cache)
        self._running.views = _Views(self, len(call.ids))
        try:
            others = call.arguments.get("logits_processor") or []
            return generate(**{**call.arguments, "logits_processor": [self._running.views, *others]})
        finally:
            self._running.views = None

    @untraced
    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In front of every forward of the model: remember what `generate()` runs it on."""
        if self._running.views is not None and not self.reduced:
            self._running.views.steps.append(kwargs)

    def run(self, inputs: dict[str, Any]) -> Tensor:
        """Logits of the reduced view behind these inputs: (rows, vocabulary)."""
        self._running.reduced = True
        try:
            return self.target.model(**inputs).logits[:, -1]
        finally:
            self._running.reduced = False


class _Views(LogitsProcessor):
    """Advances the reduced view by the step that the full view just took, and mixes the two.

    steps: inputs of the forwards of the full view since the last call.
    """

    def __init__(self, contrast: LogitsPlace, samples: int) -> None:
        self.contrast, self.samples = contrast, samples
        self.steps: list[dict[str, Any]] = []
        self.cache = new_cache(contrast.target.decoder.config)
        self.ids: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(self.steps) != 1:
            raise UnsupportedError(
                f"{self.contrast.method.name} contrasts one forward pass a step, and this way of generating made "
                f"{len(self.steps)}: use greedy decoding, sampling or beam search"
            )
        if self.ids is not None:
            self._follow(input_ids)
        self.ids = input_ids.clone()
        inputs = without_cache(self.steps.pop())
        inputs |= {cache_name(self.contrast.target.model.forward): self.cache, "use_cache": True, "return_dict": True}
        inputs.update(output_attentions=False, output_hidden_states=False)
        reduced = self.contrast.run(inputs).to(scores.device)
        return self.contrast.method.contrast(scores.float(), reduced.float()).to(scores.dtype)

    def _follow(self, input_ids: Tensor) -> None:
        """Reorder the reduced view's cache as the rows were: beams change places, and each has its prefix."""
        prefix = input_ids[:, :-1]
        assert self.ids is not None
        if prefix.shape != self.ids.shape:
            raise UnsupportedError(f"{self.contrast.method.name} cannot follow rows that come and go between steps")
        # A single row has none to change places with: nothing to wait for the device for.
        if len(prefix) == self.samples or torch.equal(prefix, self.ids):
            return
        # Rows of another sample may read the same; equal rows of one sample have equal entries.
        now, before = (ids.unflatten(0, (self.samples, -1)) for ids in (prefix, self.ids))
        same = (now.unsqueeze(2) == before.unsqueeze(1)).all(-1)
        if not bool(same.any(-1).all()):
            raise UnsupportedError(f"{self.contrast.method.name} cannot follow tokens that change between steps")
        first = torch.arange(self.samples, device=same.device).unsqueeze(1) * same.shape[2]
        self.cache.reorder_cache((same.to(torch.uint8).argmax(-1) + first).flatten())
