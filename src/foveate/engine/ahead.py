"""Queries and keys of a decoder layer that is about to run, whatever the model does to make them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..methods.tokens import LayerTokens
from .attention import Attention, unrouted
from .devices import on
from .forward import Forward
from .upstream import without_cache


class Peeked(Exception):
    """Ends a layer in front of its attention kernel, with what the kernel would have been called with."""

    def __init__(self, attention: Attention) -> None:
        super().__init__("a peek at queries and keys left the layer that was peeked at")
        self.attention = attention


def look_ahead(forward: Forward, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> LayerTokens:
    """What the layer would show a method if it ran on all rows that came so far; nothing is computed behind its keys.

    The layer itself is run up to its attention kernel, without the cache, and the entries of earlier turns are put in
    front of its keys. hidden: (batch, rows, d), what the layer before left. kwargs: the layer's other arguments.
    """
    hidden, kwargs = forward.enter(hidden, kwargs)
    forward.peeks = True
    try:
        forward.target.decoder.layers[index].forward(hidden, **without_cache(kwargs))
    except Peeked as peeked:
        attention = peeked.attention
    else:
        raise unrouted(index)
    finally:
        forward.peeks = False
    layer, device = attention.layer, attention.query.device
    rows = forward.rows
    visible = forward.valid() if rows is None else rows.real
    new: Tensor = torch.arange(forward.queries, device=device) if rows is None else rows.index
    attention.positions = new.where(new < 0, new + forward.past).expand(len(hidden), -1).unsqueeze(1)
    if layer is not None and layer.physical:
        assert layer.keys is not None
        attention.key = torch.cat([layer.keys, attention.key], dim=2)
        positions = layer.full_index(len(hidden), device)
        later = attention.positions.expand(-1, positions.shape[1], -1)
        attention.positions = torch.cat([positions, later], dim=2)
        held = positions.amax(1)  # of any head
        earlier = held >= 0
        if forward.mask is not None:
            earlier = earlier & forward.mask.gather(1, held.clamp(min=0))
        visible = torch.cat([earlier, visible], dim=1)
    tokens = dataclasses.replace(attention.tokens, visible=visible)
    forward.follow(hidden.device)
    return on(hidden.device, tokens)
