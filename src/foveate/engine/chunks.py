"""A prompt that `generate()` runs in chunks: what was chosen of it all, for each chunk its part."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import UnsupportedError
from .fixtures import Fixtures, NotPickled
from .forward import Forward
from .gaps import is_gapped
from .generation import GenerateCall
from .images import EncodedImage, attached
from .target import Target
from .upstream import SLICES_ENCODED


class Chunks(NotPickled, threading.local):
    """Listens to the prefills of one model, in each thread on its own. late: names of methods that choose when the
    prompt was read."""

    _prompt: tuple[Tensor, Tensor | None, dict[str, list[EncodedImage] | None]] | None = None
    _whole: Forward | None = None
    _keep: Tensor | None = None

    def __init__(self, target: Target, late: Sequence[str], acts: bool) -> None:
        self.target, self.late, self.acts = target, late, acts

    def install(self, fixtures: Fixtures) -> None:
        """Listen to `generate()` and its prefill."""
        fixtures.wrap(self.target.model, "generate", self._generate)
        if SLICES_ENCODED:
            fixtures.wrap(self.target.model, "_prefill", self._prefill)

    def _generate(self, generate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.acts:
            call = GenerateCall.read(self.target.model, generate, args, kwargs)
            if call.asks(("prefill_chunk_size",)) and call.brings_images:
                self._check()
        return generate(*args, **kwargs)

    def _check(self) -> None:
        if self.late:
            raise UnsupportedError(
                f"{', '.join(self.late)} chooses at the end of the prompt, and with prefill_chunk_size most of it has "
                "run by then: generate without, or use methods before the LLM"
            )
        if not SLICES_ENCODED:
            raise UnsupportedError(
                "this release of transformers loses the pictures of a prompt that it runs in chunks: generate without "
                "prefill_chunk_size, or install transformers 5.24"
            )

    def _prefill(self, prefill: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(prefill).bind(*args, **kwargs).arguments
        inputs, size = bound["model_kwargs"], bound["generation_config"].prefill_chunk_size
        encoded = {m: out for m, out in (inputs.get("mm_encoder_outputs") or {}).items() if out is not None}
        if size is None or not encoded or not bound.get("is_first_iteration", True):
            return prefill(*args, **kwargs)
        images = {medium: attached(output, self.target.family.features) for medium, output in encoded.items()}
        self._prompt = bound["input_ids"], inputs.get("attention_mask"), images
        try:
            return prefill(*args, **kwargs)
        finally:
            self._prompt = self._whole = self._keep = None

    def part(self, forward: Forward, places: Sequence[Any]) -> Forward | None:
        """In front of a chunk: what of it stays. Returns the pass that all of the prompt would be, None for no chunk.

        forward: of the chunk, on a cache that is ready for it. places: which choose among the images of the prompt.
        """
        if self._prompt is None:
            return None
        if self._whole is None:
            _check_windows(forward.cache)
            ids, mask, images = self._prompt
            ids = ids if mask is None else ids[:, forward.past - mask.shape[1] :]
            whole = Forward(
                self.target, forward.cache, ids, {"attention_mask": mask}, brings_images=True, past=forward.past
            )
            whole.encoded.update(images)
            whole.actions = [action for place in places if (action := place.act(whole)) is not None]
            whole.begin()
            whole.leave_out()
            whole.enter_all()
            self._whole, self._keep = whole, whole.streams["self"].alive(whole.valid())
        assert self._keep is not None
        start = forward.past - self._whole.past
        forward.part = self._keep[:, start : start + forward.queries]
        return self._whole


def _check_windows(cache: Any) -> None:
    """Raise UnsupportedError where layers with a window have a fixed size: a chunk may push out what it needs."""
    if is_gapped(cache) and any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        raise UnsupportedError(
            "with prefill_chunk_size and a static cache, the windows of this model's layers are not followed where "
            "tokens are dropped: generate without prefill_chunk_size, or use the default dynamic cache"
        )
