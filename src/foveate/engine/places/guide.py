"""Around `generate()`: a smaller model answers first, and what it looks at says which tokens matter."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...errors import UnsupportedError
from ...layout import ImageLayout
from ...methods.base import GuidedMethod, Method
from ..consulting import Guide, device_of
from ..fixtures import Fixtures
from ..forward import Forward
from ..generation import PIXELS, GenerateCall, brings_pixels
from ..report import Outcome
from ..support import find_target, pruned_models
from ..target import Target
from ..upstream import CACHE_NAMES
from .place import Place

# Under these settings the guide's greedy tokens are not what was asked for.
_NO_EXIT = (
    "return_dict_in_generate", "num_beams", "num_return_sequences", "do_sample", "streamer", *CACHE_NAMES,
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "custom_generate", "guidance_scale",
    "penalty_alpha", "dola_layers", "token_healing",
)  # fmt: skip


def find_guide(method: GuidedMethod, target: Target) -> Target:
    """The guide, or the reason why it cannot guide. target: the large model."""
    name = method.name
    try:
        guide = find_target(method.guide)
    except UnsupportedError as error:
        raise UnsupportedError(f"the guide of {name} cannot be used: {error}") from None
    if guide.base is target.base:
        raise UnsupportedError(f"the guide of {name} is the model itself: give a smaller one of the same family")
    own, family = guide.family.model_type, target.family.model_type
    if own != family:
        raise UnsupportedError(f"the guide of {name} is a {own} model and the model is not: give one of {family}")
    theirs, ours = guide.image_token_id, target.image_token_id
    if theirs != ours:
        raise UnsupportedError(
            f"the guide of {name} has {theirs} as the id of image tokens and the model {ours}: both must read the same "
            "tokens"
        )
    return guide


class GuidePlace(Place):
    """Around `generate()`: the guide answers, and hands on what it looked at or returns its answer."""

    def __init__(self, target: Target, method: GuidedMethod, outcome: Outcome) -> None:
        super().__init__(target, outcome)
        self.method = method
        self.guide = Guide(find_guide(method, target), method)
        self._thread = threading.local()

    @classmethod
    def of(cls, target: Target, methods: Sequence[Method], outcome: Outcome) -> Place | None:
        method = next((m for m in methods if isinstance(m, GuidedMethod)), None)
        return None if method is None else cls(target, method, outcome)

    def install(self, fixtures: Fixtures) -> None:
        fixtures.wrap(self.target.model, "generate", self.generate)

    def act(self, forward: Forward) -> None:
        """Tell the pass what the guide looked at."""
        if forward.brings_images:
            forward.guidance = self.guidance(len(forward.ids)).to(forward.home)

    def generate(self, generate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the guide answer; return that, or run the model's `generate` with what the guide looked at."""
        call = GenerateCall.read(self.target.model, generate, args, kwargs)
        if not call.brings_images:
            return generate(*args, **kwargs)
        self._check(call)
        answer, received = self.guide.consult(call, self._layouts(call))
        self.outcome.guided = answer
        if answer.exited:
            self.outcome.report = None
            return answer.sequences
        self._thread.guidance = received.to(device_of(self.target.model, call.ids))
        try:
            return generate(*args, **kwargs)
        finally:
            self._thread.guidance = None

    def guidance(self, rows: int) -> Tensor:
        """(rows, prompt) what every position received, for a prefill of `rows` rows, several a sample with beams."""
        received: Tensor | None = getattr(self._thread, "guidance", None)
        if received is None:
            raise UnsupportedError(
                f"{self.method.name} lets its guide answer first, in generate(): call that, or run the model outside "
                "the pruned block"
            )
        return received.repeat_interleave(rows // len(received), dim=0)

    def _check(self, call: GenerateCall) -> None:
        """Refuse what the guide cannot answer, or may not."""
        name = self.method.name
        if self.guide.target.base in pruned_models:
            raise UnsupportedError(f"the guide of {name} is pruned itself: remove() that first")
        if not brings_pixels(call.inputs):
            raise UnsupportedError(f"the guide of {name} encodes the images itself: pass pixel values")
        if call.past:
            raise UnsupportedError(
                f"the guide of {name} has no part in this KV cache: pass the whole conversation without a cache"
            )
        if self.method.exit_threshold is not None and (modes := call.asks(_NO_EXIT)):
            raise UnsupportedError(
                f"with exit_threshold {name} may return its guide's greedy answer, a tensor of tokens: generate "
                f"without {', '.join(modes)}, or use exit_threshold=None"
            )

    def _layouts(self, call: GenerateCall) -> dict[str, list[ImageLayout]]:
        """The images and videos as the guide will encode them: to as many tokens as the model does."""
        inputs, found = {**call.inputs, "input_ids": call.ids}, {}
        for medium in self.target.token_ids:
            if inputs.get(PIXELS[medium]) is None:
                continue
            layouts, others = (target.layouts(medium, inputs) for target in (self.guide.target, self.target))
            for i, (layout, other) in enumerate(zip(layouts, others, strict=True)):
                if layout.tokens != other.tokens:
                    raise UnsupportedError(
                        f"the guide of {self.method.name} makes {layout.tokens} tokens of {medium} {i} and the model "
                        f"{other.tokens}: use a guide that encodes {medium}s alike"
                    )
            found[medium] = self.target.joined(medium, layouts, lambda: call.ids)
        return found
