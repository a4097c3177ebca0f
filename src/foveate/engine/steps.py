"""What is about to run: which forwards are steps of `generate()`, and which tokens stand behind the prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .certified import check_greedy
from .fixtures import Fixtures, NotPickled
from .generation import brings_pixels
from .upstream import untraced

# An answer that is scored would take part in choosing the tokens it is scored on.
UNSAID = (
    "a forward outside of generate() asks for logits of more than its last token, and foveate takes all of it for the "
    "prompt. If an answer that is scored stands behind the prompt, say where the prompt ends: pass labels, or use "
    "`with pruned.prompt(tokens):`. If all of it is the prompt, logits_to_keep=1 says so"
)


@dataclass(frozen=True)
class Step:
    """What is known of the coming forward.

    behind: tokens at its end that are no prompt: guesses of assisted decoding, or an answer that is scored.
    uneven: whether they begin at another place in every sample. assisted: whether they are guesses. verifies: whether
    it checks guesses. beside: whether it is made within `generate()`, but none of the steps that `generate()` prepared.
    unsaid: whether it asks for logits of more than the last token, and nobody said where the prompt ends.
    prepared: whether `generate()` prepared it. mask: (batch, tokens) which tokens there are, where it may have made
    masks of that already. over_slots: whether it did, over what the cache holds.
    """

    behind: int = 0
    uneven: bool = False
    assisted: bool = False
    verifies: bool = False
    beside: bool = False
    unsaid: bool = False
    prepared: bool = False
    mask: Tensor | None = None
    over_slots: bool = False


class _Prepared(NamedTuple):
    """What `generate()` prepared for the coming forward, see `Step`."""

    ids: Any
    first: bool
    mask: Tensor | None
    over_slots: bool


Prepare = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[dict[str, Any], bool]]
"""Prepares a forward: its inputs, and whether their masks are over what the cache holds."""


class Steps(NotPickled, threading.local):
    """Listens to one model and its `generate()`, in each thread on its own.

    inputs: how it prepares a forward.
    prompt: how many tokens of a plain forward are the prompt, where the user said so.
    greedy: whether `generate()` may not sample, as a certificate is of greedy answers.
    """

    generates = False
    prompt: int | None = None
    _prepared: _Prepared | None = None
    _inputs: Prepare
    _coming = Step()

    def __init__(self, inputs: Prepare, *, greedy: bool = False) -> None:
        self._inputs, self._greedy = inputs, greedy

    def install(self, fixtures: Fixtures, model: Any) -> None:
        """Wrap what `generate()` calls before a step."""
        fixtures.hook(model.register_forward_pre_hook(self._announce, with_kwargs=True))
        fixtures.wrap(model, "generate", self._generate)
        fixtures.wrap(model, "prepare_inputs_for_generation", self._prepare)

    def take(self) -> Step:
        """The step that begins; what was known of it is forgotten."""
        coming, self._coming = self._coming, Step()
        return coming

    def _generate(self, generate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._greedy:
            check_greedy(kwargs.get("generation_config"), kwargs.get("do_sample"))
        outer, self.generates = self.generates, True
        try:
            return generate(*args, **kwargs)
        finally:
            self.generates = outer

    def _prepare(self, prepare: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # generate() reads the last logits only; assisted decoding asks for more, but after this call.
        if isinstance(kwargs.get("logits_to_keep"), int):
            kwargs["logits_to_keep"] = 1
        inputs, over_slots = self._inputs(prepare, args, kwargs)
        given, sent = kwargs.get("mm_encoder_outputs") or {}, inputs.get("mm_encoder_outputs") or {}
        for medium in given.keys() & sent.keys():
            # generate() sends inputs to its device without what travels with them; the output's own way keeps it.
            if sent[medium] is not given[medium] and hasattr(given[medium], "to"):
                sent[medium] = given[medium].to(inputs["input_ids"].device)
        first, mask = bool(kwargs.get("is_first_iteration", False)), kwargs.get("attention_mask")
        self._prepared = _Prepared(inputs.get("input_ids"), first, mask, over_slots)
        return inputs

    @untraced
    def _announce(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In front of the model: assisted decoding says only here how many of the coming tokens are guesses."""
        prepared, self._prepared = self._prepared, None
        # A generate() that was aborted in between leaves a note that is of no other forward.
        if prepared is None or prepared.ids is not kwargs.get("input_ids"):
            self._coming = Step(beside=True) if self.generates else self._answer(kwargs)
            return
        wanted = kwargs.get("logits_to_keep")
        guesses = wanted - 1 if isinstance(wanted, int) and wanted > 1 else 0
        self._coming = Step(
            guesses,
            assisted=True,
            verifies=not prepared.first,
            prepared=True,
            mask=prepared.mask,
            over_slots=prepared.over_slots,
        )

    def _answer(self, kwargs: dict[str, Any]) -> Step:
        """Tokens of a plain forward behind the prompt: by what the user said, or from the first label on."""
        labels, ids = kwargs.get("labels"), kwargs.get("input_ids")
        if self.prompt is not None:
            if ids is None or not self.prompt <= ids.shape[1]:
                raise ValueError(f"the prompt was said to have {self.prompt} tokens, and this forward has fewer")
            return Step(ids.shape[1] - self.prompt)
        if labels is None:
            wanted = kwargs.get("logits_to_keep") or 0  # 0 stands for all
            return Step(unsaid=isinstance(wanted, int) and wanted != 1)
        if not brings_pixels(kwargs):
            return Step()
        starts = (labels != -100).any(1) * (labels != -100).to(torch.uint8).argmax(1)
        first, last = torch.stack([starts.min(), starts.max()]).tolist()
        return Step(labels.shape[1] - first if first else 0, uneven=first != last)
