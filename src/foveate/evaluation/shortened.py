"""The shorter reference, for decoders with layers that carry a state: what a layer never saw is not there.

No mask makes such a layer forget what it read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .dense import family_of, of_query_heads

if TYPE_CHECKING:
    from foveate.engine.report import LayerReport, PruneReport
    from foveate.families.base import Family


def needs_short(report: PruneReport) -> bool:
    """Whether a layer that carries a state never read what was dropped: no mask makes it forget that."""
    return any(layer.kind == "state" and layer.kept_length < layer.length for layer in report.layers)


def short_logits(model: Any, report: PruneReport, inputs: dict[str, Any], sequences: Tensor) -> Tensor:
    """What the untouched decoder says where what a layer never saw is not there, and its position left free.

    Each sample runs by itself, prompt and answer at once, without padding or a cache. What was evicted behind the
    prefill is hidden from the answer, as in `hidden`. model: its decoder must be eager. sequences: (batch, prompt + t).
    Returns float32 (batch, t, vocabulary).
    """
    family, prompt = family_of(model), inputs["input_ids"].shape[1]
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
    with decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True):
        model(**inputs)
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
        gone = of_query_heads(gone.unsqueeze(0), decoder)
        answer = mask[:, :, prompt:].masked_fill(gone, torch.finfo(mask.dtype).min)
        mask = torch.cat([mask[:, :, :prompt].expand(-1, answer.shape[1], -1, -1), answer], 2)
        return args, {**kwargs, "attention_mask": mask}

    with ExitStack() as hooks:
        for layer, block in zip(report.layers, decoder.layers, strict=True):
            hooks.enter_context(block.register_forward_pre_hook(partial(drop, layer), with_kwargs=True))
            if layer.kind == "self":
                module = getattr(block, family.self_attention)
                hooks.enter_context(module.register_forward_pre_hook(partial(hide, layer), with_kwargs=True))
        yield
