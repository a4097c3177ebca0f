"""The dense reference: an untouched eager model that hides exactly the keys a pruned run says it dropped.

The reference replays, token by token through its own `generate()`, the sequences that the pruned run made,
with an attention mask for every layer and every KV head. Nothing of foveate's code takes part: only the
report is read, and what it claims must explain the pruned logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import tiny
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

STEPS = 12
GREEDY = dict(max_new_tokens=STEPS, do_sample=False)
BEAMS = dict(max_new_tokens=STEPS, num_beams=3, do_sample=False)
SAMPLE = dict(max_new_tokens=STEPS, do_sample=True, num_return_sequences=2)
BEAM_SAMPLE = dict(max_new_tokens=STEPS, do_sample=True, num_beams=3, num_return_sequences=2)
DECODING = {"greedy": GREEDY, "beams": BEAMS, "sample": SAMPLE}


@dataclass
class Hide:
    """Keys of one layer that queries from text position `first_query` (to `last_query`) on do not see."""

    layer: int
    keys: Tensor  # (batch, 1 or kv_heads, length), True = hidden
    first_query: int = 0
    last_query: int | None = None

    def rows(self, index: Tensor) -> Hide:
        return Hide(self.layer, self.keys[index], self.first_query, self.last_query)


def hidden(report: Any, prompt_length: int) -> list[Hide]:
    """Read what a report says was dropped. "decode" means: evicted once the prompt had been read."""
    return [
        Hide(layer.index, ~layer.kept, {"prefill": 0, "decode": prompt_length}[layer.since]) for layer in report.layers
    ]


def seen_and_kept(report: Any, prompt_length: int) -> list[Hide]:
    """Read a report of several methods: what a layer never saw, and what it lost after its prefill."""
    hides = [Hide(layer.index, ~layer.seen) for layer in report.layers]
    return hides + [Hide(layer.index, ~layer.kept, prompt_length) for layer in report.layers]


@contextmanager
def masked(model: PreTrainedModel, hides: Sequence[Hide]) -> Iterator[None]:
    """Let an eager model run with these keys invisible, by rewriting the mask each attention module gets."""
    assert model.config._attn_implementation == "eager", "only eager takes a mask per head"
    llm = tiny.of(model).language_model(model)
    end = 0  # text position behind the last query of this forward

    def note_end(module, args, kwargs):
        nonlocal end
        past = kwargs.get(tiny.CACHE)
        given = kwargs.get("inputs_embeds") if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        end = given.shape[1] + (0 if past is None else int(past.get_seq_length()))

    def hide_keys(module, args, kwargs, layer: int, cross: bool):
        queries = kwargs["hidden_states"].shape[1]
        mask = kwargs["attention_mask"]
        at = torch.arange(end - queries, end)  # some models go on with their last rows only
        for hide in (h for h in hides if h.layer == layer):
            keys = hide.keys
            if keys.shape[1] > 1:  # one set for each KV head: every query head of its group gets it
                group = getattr(module, "num_key_value_groups", 1)  # attention without groups does not name them
                assert keys.shape[1] * group == module.config.num_attention_heads
                keys = keys.repeat_interleave(group, dim=1)
            if mask is None:  # mllama without a cross_attention_mask
                mask = torch.zeros(keys.shape[0], 1, queries, keys.shape[-1])
            # Keys made since (generated text, later images) stay visible; a window has left the first behind.
            width = mask.shape[-1] if cross else end
            keys = torch.nn.functional.pad(keys, (0, width - keys.shape[-1]))[..., width - mask.shape[-1] :]
            queries_at = (at >= hide.first_query) & (at <= (at.max() if hide.last_query is None else hide.last_query))
            gone = keys[:, :, None, :] & queries_at[:, None]
            # A row that may see nothing at all must stay finite: it is padding. Over images, mllama lets a
            # text row without an image see every feature equally, and of those only the kept ones exist.
            mask = mask.masked_fill(gone, -torch.inf if cross else torch.finfo(mask.dtype).min)
        return args, kwargs | {"attention_mask": mask}

    handles = [llm.register_forward_pre_hook(note_end, with_kwargs=True)]
    for i, block in enumerate(llm.layers):
        cross = hasattr(block, "cross_attn")
        module = block.cross_attn if cross else getattr(block, "self_attn", None)
        if module is None:  # a layer that keeps no keys: what is hidden, it must never have read
            continue
        hook = lambda m, a, k, i=i, cross=cross: hide_keys(m, a, k, i, cross)  # noqa: E731
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def silenced(model, report, rows: Tensor) -> Iterator[None]:
    """Zero what attention hands to its output projection at the prompt rows that a report says a layer dropped."""

    def silence(kept: Tensor):
        def hook(module, args):
            (states,) = args
            return None if states.shape[1] == 1 else (states * kept[:, -states.shape[1] :].unsqueeze(-1),)

        return hook

    decoder = tiny.of(model).language_model(model)
    handles = [
        decoder.layers[layer.index].self_attn.o_proj.register_forward_pre_hook(silence(layer.kept[rows, 0]))
        for layer in report.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Replay(LogitsProcessor):
    """Force `generate` to produce given tokens."""

    def __init__(self, sequences: Tensor):
        self.sequences = sequences

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.sequences[:, input_ids.shape[1], None], 0.0)


@torch.no_grad()
def dense_logits(
    model: PreTrainedModel, batch: dict, sequences: Tensor, hides: Sequence[Hide] = (), **kwargs
) -> tuple[Tensor, Any]:
    """Replay `sequences` on the untouched model; return logits (sequences, steps, vocab) and the cache."""
    prompt = batch["input_ids"].shape[1]
    copies = len(sequences) // len(batch["input_ids"])
    with masked(model, hides):
        out = tiny.of(model).replay(
            model,
            **batch,
            max_new_tokens=sequences.shape[1] - prompt,
            do_sample=True,  # so that the prompt may be expanded; the processor leaves no choice
            num_return_sequences=copies,
            logits_processor=[Replay(sequences)],
            output_logits=True,
            return_dict_in_generate=True,
            **kwargs,
        )
    assert torch.equal(out.sequences, sequences), "the reference did not replay the sequences"
    return torch.stack(out.logits, 1), getattr(out, tiny.CACHE)


@dataclass
class Run:
    """What `generate` gave: for each returned sequence its logits, and the prefill row it descends from."""

    sequences: Tensor
    logits: Tensor  # (sequences, steps, vocab), raw
    rows: Tensor
    cache: Any
    beams: Tensor | None = None  # (sequences, steps), the row that each step's logits are of


@torch.no_grad()
def run(model: PreTrainedModel, batch: dict, seed: int = 0, **kwargs) -> Run:
    """Generate with raw logits; with beams, follow the chosen beams back through the steps."""
    torch.manual_seed(seed)
    out = model.generate(**batch, **kwargs, output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(out.logits, 1)
    if (beams := out.get("beam_indices")) is not None:
        beams = beams.long()
        assert (beams >= 0).all(), "a beam ended early"
        logits = logits[beams, torch.arange(beams.shape[1])]
        return Run(out.sequences, logits, beams[:, 0], getattr(out, tiny.CACHE), beams)
    rows = torch.arange(len(out.sequences))
    return Run(out.sequences, logits, rows, getattr(out, tiny.CACHE), rows.unsqueeze(1).expand(-1, logits.shape[1]))


def errors(reference: PreTrainedModel, batch: dict, pruned: Run, hides: Sequence[Hide]) -> Tensor:
    """Return the largest absolute logit difference of each step."""
    dense, _ = dense_logits(reference, batch, pruned.sequences, [h.rows(pruned.rows) for h in hides])
    return (dense - pruned.logits).abs().amax((0, 2))


@contextmanager
def without(decoder: Any, alive: Tensor) -> Iterator[None]:
    """Let each layer go on with its own tokens only. alive: bool (layers, tokens); fewer from layer to layer."""

    def drop(index: int, layer: Any, args: Any, kwargs: Any) -> Any:
        before = alive[max(index - 1, 0)] if index else torch.ones_like(alive[0])
        rotary = tuple(part[:, alive[index]] for part in kwargs["position_embeddings"])
        more = {"position_embeddings": rotary, "position_ids": None}
        return (args[0][:, alive[index][before]], *args[1:]), kwargs | more

    hooks = [
        layer.register_forward_pre_hook(partial(drop, index), with_kwargs=True)
        for index, layer in enumerate(decoder.layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def short_errors(reference: PreTrainedModel, batch: dict, pruned: Run, report: Any) -> Tensor:
    """The largest absolute logit difference of each step, where a mask cannot hide what a layer read into its state.

    The untouched decoder runs on each sequence by itself, without a cache, and what was dropped is not there. What is
    evicted behind the prefill cannot be shown so. reference: with sdpa, which needs no mask to be causal.
    """
    assert all(layer.since == "prefill" for layer in report.layers)
    decoder = tiny.of(reference).language_model(reference)
    prompt, steps = batch["input_ids"].shape[1], pruned.logits.shape[1]
    embeds, positions = embedded(reference, batch)
    kept = torch.stack([layer.kept[:, 0] for layer in report.layers], 1)
    worst = torch.zeros(steps)
    for row, sequence, found in zip(pruned.rows.tolist(), pruned.sequences, pruned.logits, strict=True):
        sample = row * len(embeds) // len(kept)
        real = batch["attention_mask"][sample].bool()
        answer = reference.get_input_embeddings()(sequence[prompt:-1])
        where = positions[..., sample : sample + 1, real]
        where = torch.cat([where, where[..., -1:] + torch.arange(1, steps)], -1)
        alive = torch.nn.functional.pad(kept[row][:, real], (0, steps - 1), value=True)
        with without(decoder, alive):
            prompt_and_answer = torch.cat([embeds[sample, real], answer]).unsqueeze(0)
            states = decoder(inputs_embeds=prompt_and_answer, position_ids=where, use_cache=False).last_hidden_state
        logits = reference.get_output_embeddings()(states)[0, -steps:]
        worst = torch.maximum(worst, (logits - found).abs().amax(-1))
    return worst


@torch.no_grad()
def embedded(model: PreTrainedModel, batch: dict) -> tuple[Tensor, Tensor]:
    """Return what the untouched LLM gets for a prompt: embeddings and position ids (3-D for M-RoPE)."""
    seen = {}

    def note(module, args, kwargs):
        seen.update(kwargs)

    handle = tiny.of(model).language_model(model).register_forward_pre_hook(note, with_kwargs=True)
    try:
        model(**batch)
    finally:
        handle.remove()
    positions = seen["position_ids"]
    if positions is None:
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return seen["inputs_embeds"], positions
