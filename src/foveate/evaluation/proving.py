"""The proof: a pruned run beside a reference, the untouched model without what the run says that it dropped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor

from foveate.engine.session import prune
from foveate.errors import UnsupportedError
from foveate.methods.base import DepthMethod, GuidedMethod

from .dense import eager, hidden
from .held import faults, note_held
from .shortened import needs_short, short_logits

if TYPE_CHECKING:
    from foveate.engine.report import PruneReport
    from foveate.methods.base import Method

# Units in the last place of the largest logit that rounding may add up to: about ten (float32) and two (half precision)
# times the most that was seen on random models of 4 to 64 layers. Half precision leaves no room for more: there, a run
# without pruning differs by 43 units and up.
ROUNDING = {torch.float32: 256, torch.float64: 256, torch.bfloat16: 24, torch.float16: 24}


@dataclass(frozen=True)
class Step:
    """One generated token, greedy.

    token: what the pruned model chose, and what the reference is fed. reference: what the reference would have chosen.
    difference: the largest between the two models' logits. unhidden: the same with a reference that hides nothing,
    which is what pruning changes.
    """

    token: int
    reference: int
    difference: float
    unhidden: float


@dataclass(frozen=True)
class Proof:
    """A pruned run beside the dense reference.

    scale: the largest absolute logit. faults: what the KV cache does not hold as the report says, one line each.
    """

    steps: tuple[Step, ...]
    dtype: torch.dtype
    scale: float
    report: PruneReport = field(repr=False)
    faults: tuple[str, ...]

    @property
    def tolerance(self) -> float:
        """How far rounding alone may move a logit: units in the last place of the largest one, by dtype."""
        return ROUNDING[self.dtype] * torch.finfo(self.dtype).eps * self.scale

    @property
    def difference(self) -> float:
        """The largest of all steps; NaN if any is."""
        return _largest(step.difference for step in self.steps)

    @property
    def same_tokens(self) -> bool:
        """Whether the reference would have chosen every token alike."""
        return all(step.token == step.reference for step in self.steps)

    @property
    def holds(self) -> bool:
        """Whether the logits agree up to rounding and the memory is what the report says."""
        return self.difference <= self.tolerance and not self.faults

    @property
    def blind(self) -> bool:
        """Whether even a reference that hides nothing passes, so that the logits prove nothing."""
        return _largest(step.unhidden for step in self.steps) <= self.tolerance


def _largest(numbers: Iterator[float]) -> float:
    return max(numbers, key=lambda number: (math.isnan(number), number))


def cannot_prove(methods: Sequence[Method]) -> str | None:
    """Why hiding keys cannot imitate these methods, or None."""
    for method in methods:
        if isinstance(method, GuidedMethod) and method.exit_threshold is not None:
            return f"with exit_threshold {method.name} may drop nothing and return its guide's answer: leave it out"
    # Rows that fall silent in sparse attention, or skip layers, are no keys, but in the reference they do so, too.
    provable = [
        m.keeps_all or m.only_drops or getattr(m, "sparse_attention", False) or isinstance(m, DepthMethod)
        for m in methods
    ]
    names = [method.name for method, fine in zip(methods, provable, strict=True) if not fine]
    if not names:
        return None
    return (
        f"{' and '.join(names)} does more than drop tokens once (it changes those that stay, or what is said), so "
        "masking them in the untouched model cannot give the same logits: check a method that only drops"
    )


@torch.inference_mode()
def prove(
    model: Any,
    inputs: dict[str, Any],
    methods: Sequence[Method],
    *,
    steps: int = 16,
    clips: int | Sequence[int] | None = None,
) -> Proof:
    """Generate `steps` tokens with the pruned model, and replay them on the untouched one, dropped keys hidden.

    model: not pruned at the moment; it is left as it was. inputs: what `generate` takes, on the model's device.
    methods: applied together. clips: as `Pruned.clips` takes it, None to say nothing. The model goes on behind the end
    of its answer, so that all steps are compared.

    Raises:
        UnsupportedError: what `foveate.prune` refuses, and methods that do more than drop tokens.
        ValueError: what `foveate.prune` raises.
    """
    if reason := cannot_prove(methods):
        raise UnsupportedError(reason)
    with (
        prune(model, methods, record=True) as pruned,
        nullcontext() if clips is None else pruned.clips(clips),
        note_held(pruned.base) as held,
    ):
        sequences, logits, _ = generate(model, inputs, steps)
    report = pruned.report
    assert report is not None
    with eager(pruned.decoder):
        if needs_short(report):
            dense = short_logits(model, report, inputs, sequences)
            chosen = dense.argmax(-1)
        else:
            with hidden(model, report):
                _, dense, chosen = generate(model, inputs, steps, replay=sequences)
        _, untouched, _ = generate(model, inputs, steps, replay=sequences)
    by_step = (0, 2)
    table = zip(
        sequences[0, -steps:].tolist(),
        chosen[0].tolist(),
        (dense - logits).abs().amax(by_step).tolist(),
        (untouched - logits).abs().amax(by_step).tolist(),
        strict=True,
    )
    return Proof(
        steps=tuple(Step(*row) for row in table),
        dtype=model.dtype,
        scale=float(dense.abs().max()),
        report=report,
        faults=tuple(faults(report, held)),
    )


class _Replay(LogitsProcessor):
    """Makes `generate` repeat given tokens, and notes what it would have chosen."""

    def __init__(self, sequences: Tensor) -> None:
        self.sequences = sequences
        self.chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.chosen.append(scores.argmax(-1))
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.sequences[:, input_ids.shape[1], None], 0.0)


def generate(
    model: Any, inputs: dict[str, Any], steps: int, replay: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences, raw logits as float32 (batch, steps, vocabulary), and the greedy choices (batch, steps)."""
    processor = None if replay is None else _Replay(replay)
    # What replays is no longer pruned; the generate() of Janus takes no logits processor.
    make = model.generate if replay is None else partial(GenerationMixin.generate, model)
    out = make(
        **inputs,
        do_sample=False,
        num_beams=1,
        min_new_tokens=steps,
        max_new_tokens=steps,
        logits_processor=[processor] if processor else None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    chosen = torch.stack(processor.chosen, 1) if processor else out.sequences[:, -steps:]
    return out.sequences, torch.stack(out.logits, 1).float(), chosen
