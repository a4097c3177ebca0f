"""The dense reference: the untouched model, from which is hidden what a pruned run says it dropped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.families import get_family

if TYPE_CHECKING:
    from foveate.engine.report import LayerReport, PruneReport
    from foveate.families.base import Family


@contextmanager
def eager(decoder: Any) -> Iterator[None]:
    """The only implementation that takes a mask for every head."""
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


@contextmanager
def hidden(model: Any, report: PruneReport) -> Iterator[None]:
    """Let the untouched model, whose decoder must be eager, attend to no entry that the report calls dropped.

    In its prefill a layer sees `seen`, and rows that it never saw stay silent in it, or skip it where tokens can;
    afterwards it sees `kept` and what is generated, and of that only what a step read where it chose. Nothing else of
    the pruned run takes part.
    """
    family = family_of(model)
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
        gone = of_query_heads(gone, decoder)
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

    with ExitStack() as hooks:
        hooks.enter_context(decoder.register_forward_hook(end))
        for layer, block in zip(report.layers, decoder.layers, strict=True):
            if layer.kind == "state":
                continue  # it saw everything
            module = getattr(block, getattr(family, f"{layer.kind}_attention"))
            hooks.enter_context(module.register_forward_pre_hook(partial(hide, layer), with_kwargs=True))
            if layer.kind == "self":
                made = getattr(module, "o_proj", None) or module.out_proj
                hooks.enter_context(made.register_forward_pre_hook(partial(silence, layer)))
            if layer.taken is not None:
                hooks.enter_context(block.register_forward_hook(partial(skip, layer), with_kwargs=True))
        yield


def of_query_heads(gone: Tensor, decoder: Any) -> Tensor:
    """One set a KV head, bool (batch, kv_heads, ...), for all query heads that share it; one set for all stays."""
    heads = gone.shape[1]
    return gone if heads == 1 else gone.repeat_interleave(decoder.config.num_attention_heads // heads, dim=1)


def family_of(model: Any) -> Family:
    """The family of a model that was pruned."""
    family = get_family(model.config)
    assert family is not None, "what was pruned has a family"
    return family
