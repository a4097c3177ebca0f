"""The reference: the untouched model, from which the keys are hidden that a pruned run says it dropped.

Where a layer carries a state, what it never read is not there instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from foveate.engine.session import prune
from foveate.engine.upstream import cache_behind, held_layers
from foveate.errors import UnsupportedError
from foveate.families import get_family
from foveate.methods.base import DepthMethod, GuidedMethod

if TYPE_CHECKING:
    from foveate.engine.report import LayerReport, PruneReport
    from foveate.families.base import Family
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
        _note_storage(pruned.base) as held,
    ):
        sequences, logits, _ = _generate(model, inputs, steps)
    report = pruned.report
    assert report is not None
    with eager(pruned.decoder):
        if needs_short(report):
            dense = short_logits(model, report, inputs, sequences)
            chosen = dense.argmax(-1)
        else:
            with hidden(model, report):
                _, dense, chosen = _generate(model, inputs, steps, replay=sequences)
        _, untouched, _ = _generate(model, inputs, steps, replay=sequences)
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
        faults=tuple(_faults(report, held)),
    )


# -- the reference ----------------------------------------------------------------------------------------------------


@contextmanager
def hidden(model: Any, report: PruneReport) -> Iterator[None]:
    """Let the untouched model, whose decoder must be eager, attend to no entry that the report calls dropped.

    In its prefill a layer sees `seen`, and rows that it never saw stay silent in it, or skip it where tokens can;
    afterwards it sees `kept` and what is generated, and of that only what a step read where it chose. Nothing else of
    the pruned run takes part.
    """
    family = _family(model)
    decoder = family.decoder(family.base(model))
    reading, step = True, 0  # the prompt, and then its steps
    chosen = [] if report.decoding is None else report.decoding.chosen

    def hide(layer: LayerReport, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        shown = layer.seen if reading else layer.kept
        if not reading and step <= len(chosen):
            shown = chosen[step - 1].get(layer.index, shown)
        assert shown is not None
        queries, mask = kwargs["hidden_states"], kwargs["attention_mask"]
        if mask is None:  # mllama without a cross_attention_mask
            mask = queries.new_zeros(len(queries), 1, queries.shape[1], shown.shape[2])
        gone = ~shown.to(mask.device)
        if gone.shape[1] > 1:  # one set a KV head: for all query heads that share it
            gone = gone.repeat_interleave(decoder.config.num_attention_heads // gone.shape[1], dim=1)
        if layer.kind == "self":
            # What was made since is seen, and a window has left the first behind.
            width = layer.length + (0 if reading else step)
            gone = nn.functional.pad(gone, (0, width - gone.shape[-1]))[..., width - mask.shape[-1] :]
        # Padding rows see nothing and must stay finite. A text row without an image sees all features of mllama
        # equally, and of those only the kept ones exist.
        lowest = -torch.inf if layer.kind == "cross" else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask.masked_fill(gone.unsqueeze(2), lowest)}

    def silence(layer: LayerReport, module: nn.Module, args: tuple[Tensor]) -> Any:
        assert layer.seen is not None
        return (args[0] * layer.seen[:, 0, :, None].to(args[0]),) if reading else None

    def skip(layer: LayerReport, block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not reading:
            return None
        entered = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        made = output if isinstance(output, Tensor) else output[0]
        assert layer.taken is not None
        made = torch.lerp(entered, made, layer.taken.to(made).unsqueeze(-1))
        return made if isinstance(output, Tensor) else (made, *output[1:])

    def end(*_: Any) -> None:
        nonlocal reading, step
        reading, step = False, step + 1

    handles = [decoder.register_forward_hook(end)]
    for layer, block in zip(report.layers, decoder.layers, strict=True):
        if layer.kind == "state":
            continue  # it saw everything
        module = getattr(block, getattr(family, f"{layer.kind}_attention"))
        handles.append(module.register_forward_pre_hook(_bind(hide, layer), with_kwargs=True))
        if layer.kind == "self":
            made = getattr(module, "o_proj", None) or module.out_proj
            handles.append(made.register_forward_pre_hook(_bind(silence, layer)))
        if layer.taken is not None:
            handles.append(block.register_forward_hook(_bind(skip, layer), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def needs_short(report: PruneReport) -> bool:
    """Whether a layer that carries a state never read what was dropped: no mask makes it forget that."""
    return any(layer.kind == "state" and layer.kept_length < layer.length for layer in report.layers)


def short_logits(model: Any, report: PruneReport, inputs: dict[str, Any], sequences: Tensor) -> Tensor:
    """What the untouched decoder says where what a layer never saw is not there, and its position left free.

    Each sample runs by itself, prompt and answer at once, without padding or a cache. What was evicted behind the
    prefill is hidden from the answer, as in `hidden`. model: its decoder must be eager. sequences: (batch, prompt + t).
    Returns float32 (batch, t, vocabulary).
    """
    family, prompt = _family(model), inputs["input_ids"].shape[1]
    decoder, steps = family.decoder(family.base(model)), sequences.shape[1] - prompt
    embeds, positions = _embedded(model, decoder, inputs)
    mask = inputs.get("attention_mask")
    found = []
    for row, sequence in enumerate(sequences):
        real = torch.ones(prompt, dtype=torch.bool) if mask is None else mask[row].bool().cpu()
        answer = model.get_input_embeddings()(sequence[prompt:-1]).to(embeds.device)
        where = positions[..., row : row + 1, :][..., real.to(positions.device)]
        ahead = torch.arange(1, steps, device=where.device)
        where = torch.cat([where, where[..., -1:] + ahead], -1)
        with _left(decoder, family, report, row, real, steps):
            states = decoder(
                inputs_embeds=torch.cat([embeds[row, real.to(embeds.device)], answer]).unsqueeze(0),
                position_ids=where,
                use_cache=False,
            ).last_hidden_state
        found.append(model.get_output_embeddings()(states[0, -steps:]).float())
    return torch.stack(found).to(sequences.device)


def _embedded(model: Any, decoder: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the decoder gets of a prompt: embeddings (batch, q, hidden), and positions (..., batch, q)."""
    seen: dict[str, Any] = {}
    note = decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    try:
        model(**inputs)
    finally:
        note.remove()
    embeds, positions = seen["inputs_embeds"], seen.get("position_ids")
    if positions is None:
        mask = inputs.get("attention_mask")
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    return embeds, positions


@contextmanager
def _left(decoder: Any, family: Family, report: PruneReport, row: int, real: Tensor, steps: int) -> Iterator[None]:
    """Let each layer go on with the tokens of one sample that it saw, and its answer see what it kept of them.

    real: bool (prompt,) what is no padding. steps: of the answer, the last of which is no input.
    """
    chosen = [] if report.decoding is None else report.decoding.chosen

    def among(layer: LayerReport, shown: Tensor | None) -> Tensor:
        """bool (1 | kv_heads, tokens) of what is shown to the layer, among all tokens of the sample and its answer."""
        assert shown is not None and layer.taken is None
        # What a step chose says of the answer so far, too.
        prompt, answer = shown[row].cpu().tensor_split([len(real)], -1)
        return torch.cat(
            [prompt[:, real], nn.functional.pad(answer, (0, steps - 1 - answer.shape[-1]), value=True)], -1
        )

    alive = [among(layer, layer.seen)[0] for layer in report.layers]

    def drop(layer: LayerReport, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        (name, given) = ("", args[0]) if args else ("hidden_states", kwargs["hidden_states"])
        now = alive[layer.index]
        before = alive[layer.index - 1] if layer.index else torch.ones_like(now)
        states, mask = given[:, now[before].to(given.device)], kwargs.get("attention_mask")
        # On a split model these need not be where the layer is.
        rotary = tuple(part[:, now.to(part.device)] for part in kwargs["position_embeddings"])
        more: dict[str, Any] = {"position_embeddings": rotary}
        if isinstance(mask, Tensor):
            here = now.to(mask.device)
            more["attention_mask"] = mask[:, :, here][..., here] if mask.ndim == 4 else mask[:, here]
        if name:
            return args, {**kwargs, **more, "position_ids": None, name: states}
        return (states, *args[1:]), {**kwargs, **more, "position_ids": None}

    def hide(layer: LayerReport, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask, now = kwargs["attention_mask"], alive[layer.index]
        prompt = int(now[: int(real.sum())].sum())
        shown = [
            step.get(layer.index, layer.kept) for step in (*chosen[: steps - 1], *[{}] * (steps - 1 - len(chosen)))
        ]
        if not shown:
            return None
        gone = torch.stack([~among(layer, one)[:, now] for one in shown], 1).to(mask.device)
        if len(gone) > 1:  # one set a KV head: for all query heads that share it
            gone = gone.repeat_interleave(decoder.config.num_attention_heads // len(gone), dim=0)
        answer = mask[:, :, prompt:].masked_fill(gone, torch.finfo(mask.dtype).min)
        mask = torch.cat([mask[:, :, :prompt].expand(-1, answer.shape[1], -1, -1), answer], 2)
        return args, {**kwargs, "attention_mask": mask}

    handles = []
    for layer, block in zip(report.layers, decoder.layers, strict=True):
        handles.append(block.register_forward_pre_hook(_bind(drop, layer), with_kwargs=True))
        if layer.kind == "self":
            module = getattr(block, family.self_attention)
            handles.append(module.register_forward_pre_hook(_bind(hide, layer), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bind(hook: Any, layer: LayerReport) -> Any:
    return lambda *args: hook(layer, *args)


@contextmanager
def eager(decoder: Any) -> Iterator[None]:
    """The only implementation that takes a mask for every head."""
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


class _Replay(LogitsProcessor):
    """Makes `generate` repeat given tokens, and notes what it would have chosen."""

    def __init__(self, sequences: Tensor) -> None:
        self.sequences = sequences
        self.chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.chosen.append(scores.argmax(-1))
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.sequences[:, input_ids.shape[1], None], 0.0)


def _generate(
    model: Any, inputs: dict[str, Any], steps: int, replay: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences, raw logits as float32 (batch, steps, vocabulary), and the greedy choices (batch, steps)."""
    processor = None if replay is None else _Replay(replay)
    out = model.generate(
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


def _family(model: Any) -> Family:
    family = get_family(model.config)
    assert family is not None, "what was pruned has a family"
    return family


# -- the memory -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """What a cache layer holds behind the prefill: slots, bytes of a slot, of the tensors, and of their storage."""

    slots: int
    slot_bytes: int
    bytes: int
    storage: int

    @staticmethod
    def of(layer: Any) -> _Held:
        tensors = [layer.keys, layer.values]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        size = sum(t.numel() * t.element_size() for t in tensors)
        slots = layer.keys.shape[-2]
        return _Held(slots, size // max(slots, 1), size, sum(storages.values()))


@contextmanager
def _note_storage(base: nn.Module) -> Iterator[dict[int, _Held]]:
    """Measure the cache behind the first forward, when the hooks of the pruning, which came first, have run."""
    held: dict[int, _Held] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        cache = cache_behind(output)
        if not held and cache is not None:
            held.update((i, _Held.of(layer)) for i, layer in held_layers(cache).items())

    handle = base.register_forward_hook(note)
    try:
        yield held
    finally:
        handle.remove()


def _faults(report: PruneReport, held: dict[int, _Held]) -> Iterator[str]:
    """What the report says of the memory and the cache belies."""
    for layer, real in ((layer, held[layer.index]) for layer in report.layers if layer.index in held):
        assert layer.kept is not None
        kept = int(layer.kept.sum(-1).max())
        if layer.sliding:  # what the window left behind is kept, and held no more
            kept = min(kept, real.slots)
        if layer.kept_length != real.slots:
            yield f"layer {layer.index} reports {layer.kept_length} entries, but its cache has {real.slots}"
        elif kept < layer.length and (real.slots, real.storage) != (kept, kept * real.slot_bytes):
            yield (
                f"layer {layer.index} says that it keeps {kept} of {layer.length} entries, but its cache has "
                f"{real.slots} in {real.storage} bytes instead of {kept * real.slot_bytes}: not freed"
            )
    total = sum(real.bytes for real in held.values())
    if report.kv_bytes != total:
        yield f"the report says that the KV cache has {report.kv_bytes} bytes, but it has {total}"
