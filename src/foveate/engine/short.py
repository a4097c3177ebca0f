"""The shorter way through the decoder, for methods before the LLM on caches whose layers stay as they are.

The decoder itself is handed the tokens that stay, with their positions and what masks say of them, and what it returns
is spread out again. Static, quantised and offloaded caches hold what they get: nothing is evicted, and no cache layer
and no attention is touched. Only the cache as a whole answers for all tokens, see `gaps`.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .adoption import check_cache, check_evicts, unfit
from .cache import active
from .forward import Forward
from .gaps import Gapped, is_gapped, open_gaps
from .generation import brings_pixels
from .masks import causal_over, gather_mask
from .rows import Rows
from .steps import Step
from .target import Target
from .upstream import cache_in, cache_name, create_masks_for_generate, untraced
from .watching import named


class ShorterWay:
    """Which passes of a session go this way.

    acts: whether any method does. late: whether one drops what is only known while the decoder runs.
    """

    def __init__(self, target: Target, *, acts: bool, late: bool) -> None:
        self.target, self.acts, self.late = target, acts, late

    def opens(self, cache: Any) -> bool:
        """Whether a pass on this cache goes the shorter way, because its layers cannot lose entries. Where it lacks
        tokens, or is about to, it answers for them from now on.

        Raises:
            UnsupportedError: where methods or the attention cannot do with it.
        """
        check_cache(cache)
        if not is_gapped(cache) and unfit(cache) is None:
            return False
        if self.late:
            check_evicts(cache)
        if self._lacks(cache):
            if "flash" in self.target.decoder.config._attn_implementation:
                raise UnsupportedError(
                    "with a cache of this kind positions have gaps where tokens were dropped, which flash attention "
                    'reads as several samples in a row: load the model with attn_implementation="sdpa", or use the '
                    "default dynamic cache"
                )
            open_gaps(cache)
        return True

    def _lacks(self, cache: Any) -> bool:
        return self.acts or is_gapped(cache)

    def prepare(self, prepare: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """What `generate()` prepares for a forward; and whether its masks are over slots already.

        For a single token on a gapped cache they are, and always of one shape where the cache has one: a compiled step
        is compiled once.
        """
        cache = cache_in(kwargs)
        gapped = cache is not None and not self.late and self._lacks(cache) and self.opens(cache)
        inputs = prepare(*args, **kwargs)
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if not gapped or not _is_ready(mask) or ids is None or ids.shape[1] > 1 or brings_pixels(inputs):
            return inputs, False
        return {**inputs, "attention_mask": slot_masks(self.target, cache, mask, ids)}, True


def past_of(cache: Any, step: Step, ids: Tensor) -> int:
    """Tokens in front of a pass; in a step of generate() as its mask has it: a static cache counts on its device."""
    if step.mask is not None and ids.shape[1] == 1:
        return step.mask.shape[1] - 1
    return int(cache.get_seq_length())


def watch_decoder(forward: Forward) -> None:
    """Hand the decoder of this pass the tokens that stay, and spread out what it makes of them."""
    target = forward.target
    before, behind = functools.partial(_before, forward), functools.partial(_behind, forward)
    forward.hooks.append(target.decoder.register_forward_pre_hook(before, with_kwargs=True))
    assert target.norm is not None
    forward.hooks.append(target.norm.register_forward_hook(behind))


@untraced
def _before(forward: Forward, module: Any, args: Any, kwargs: Any = None) -> Any:
    if active.forward is not forward:
        return None
    kwargs = named(type(module), args) | kwargs
    target, cache, embeds = forward.target, forward.cache, kwargs["inputs_embeds"]
    forward.follow(embeds.device)
    forward.begin()
    whole = _masks_of_all(target, kwargs.get("attention_mask"), embeds, cache) if is_gapped(cache) else None
    forward.leave_out()
    forward.enter_all()
    rows = forward.rows
    if not is_gapped(cache):
        return (), kwargs
    if forward.queries > 1:
        cache.check_room(forward.queries if rows is None else rows.source.shape[1])
    positions = kwargs.get("position_ids")
    if positions is None:  # what the decoder would count by itself
        positions = (torch.arange(forward.queries, device=embeds.device) + forward.past).unsqueeze(0)
    if rows is not None:
        cache.expect(rows, forward.queries)
        own = {"attention_mask", "position_ids"} | _added(target)
        kwargs = {name: value if name in own else forward.shortened(name, value) for name, value in kwargs.items()}
        source = rows.source.expand(*positions.shape[:-2], -1, -1)
        positions = positions.expand(*source.shape[:-1], -1).gather(-1, source)
    mask = slot_masks(target, cache, whole, forward.ids, forward.past, rows)
    forward.inside = True
    return (), kwargs | {"attention_mask": mask, "position_ids": positions}


@untraced
def _behind(forward: Forward, module: Any, args: Any, hidden: Tensor) -> Tensor | None:
    if active.forward is not forward:
        return None
    forward.inside = False
    forward.follow(hidden.device)
    return forward.leave(hidden)


def _added(target: Target) -> frozenset[str]:
    """What the decoder hands on whole, to where features are added to image tokens between two layers."""
    name = target.family.deepstack
    return frozenset() if name is None else frozenset(inspect.signature(getattr(target.decoder, name)).parameters)


# -- masks ---------------------------------------------------------------------------------------------------------


def _is_ready(mask: Any) -> bool:
    """Whether masks of queries and keys were made already, one or one for each type of layer."""
    return isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim == 4)


def _masks_of_all(target: Target, mask: Any, embeds: Tensor, cache: Gapped) -> Any:
    """The decoder's masks over all positions, as `generate()` makes them ahead for compiled steps: a mask (None where
    it says nothing), or one for each type of layer. mask: these already, or bool (batch, tokens), or None."""
    if _is_ready(mask):
        return mask
    return create_masks_for_generate(
        config=target.decoder.config,
        inputs_embeds=embeds[..., :0],
        attention_mask=mask,
        **{cache_name(create_masks_for_generate): cache},
    )


def slot_masks(
    target: Target, cache: Gapped, masks: Any, ids: Tensor, past: int | None = None, rows: Rows | None = None
) -> Any:
    """Masks over slots, made of masks over all positions.

    masks: one, or by type of layer. ids: (batch, q) tokens of the pass. past: how many are before them, None for all
    that the cache answers for. rows: those that are computed, None for all; the cache expects them.
    """
    types = list(getattr(target.decoder.config, "layer_types", None) or ())
    queries = ids.shape[1] if rows is None else rows.source.shape[1]

    def over_slots(mask: Tensor | None, layer: int) -> Tensor | None:
        if target.kinds[layer] == "state":
            if rows is None:
                return mask
            if mask is None:
                return rows.real if rows.ragged else None
            return (mask[:, -ids.shape[1] :].gather(1, rows.source).bool() & rows.real).to(mask.dtype)
        kept, first = cache.sizes(queries, layer)
        at = cache.positions(first, kept, ids.device).expand(len(ids), -1)
        if mask is not None:
            end, heads = mask.shape[-1], mask.shape[1]
            return gather_mask(mask, None if rows is None else rows.source, at.unsqueeze(1), end, heads)
        if not cache.ragged and kept == cache.slots + queries and queries in (1, kept):
            return None  # still causal, and nothing to hide
        asking = torch.arange(queries, device=ids.device).unsqueeze(0) if rows is None else rows.source
        return causal_over(asking + (cache.get_seq_length() if past is None else past), at)

    if isinstance(masks, dict):
        layers = {name: types.index(name) if name in types else target.text_layer for name in masks}
        return {name: over_slots(mask, layers[name]) for name, mask in masks.items()}
    return over_slots(masks, target.text_layer)
