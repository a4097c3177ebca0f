"""The hooks around the decoder layers of one forward pass: they let the actions of the places act, in their order."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor

from .attention import unrouted
from .cache import active
from .forward import Forward
from .upstream import untraced


def watch_layers(forward: Forward, *, routed: bool) -> None:
    """Let the actions of a pass act around the layers, in this pass only: decoding steps do without these hooks.

    routed: whether every layer must have asked transformers for its kernel.
    """
    decoder, norm = forward.target.decoder, forward.target.norm
    assert norm is not None
    before = functools.partial(_before_layer, forward, routed)
    behind, after = functools.partial(_behind_layer, forward), functools.partial(_after_layers, forward, routed)
    for index, layer in enumerate(decoder.layers):
        forward.hooks.append(layer.register_forward_pre_hook(functools.partial(before, index), with_kwargs=True))
        forward.hooks.append(layer.register_forward_hook(functools.partial(behind, index)))
    forward.hooks.append(norm.register_forward_hook(after))


@untraced
def _before_layer(forward: Forward, routed: bool, index: int, module: Any, args: Any, kwargs: Any = None) -> Any:
    # Another thread's; torch passes no kwargs where that thread takes its hook off at this very moment.
    if active.forward is not forward:
        return None
    if index and routed:
        _check_routed(forward, index - 1)
    forward.follow(args[0].device)
    if index == 0:
        forward.begin()
    hidden, kwargs = args[0], named(type(module), args, behind=1) | kwargs
    for action in forward.actions:
        hidden, kwargs = action.before_layer(index, hidden, kwargs)
    hidden, kwargs = forward.enter(hidden, kwargs)
    if forward.target.kinds[index] == "state":
        kwargs = forward.enter_state(index, kwargs)
    for action in forward.actions:
        action.entering(index, hidden)
    return (hidden,), kwargs


def named(module: type, args: tuple[Any, ...], behind: int = 0) -> dict[str, Any]:
    """What a module of this type is given without names, by name; but so many of the first."""
    return dict(zip(_parameters(module)[behind:], args[behind:], strict=False)) if args else {}


@functools.cache
def _parameters(layer: Any) -> list[str]:
    return list(inspect.signature(layer.forward).parameters)[1:]


@untraced
def _behind_layer(forward: Forward, index: int, module: Any, args: Any, hidden: Tensor) -> Tensor | None:
    if active.forward is not forward:
        return None
    forward.follow(hidden.device)
    for action in forward.actions:
        hidden = action.behind_layer(index, hidden)
    return hidden


@untraced
def _after_layers(forward: Forward, routed: bool, module: Any, args: Any, hidden: Tensor) -> Tensor | None:
    if active.forward is not forward:
        return None
    if routed:
        _check_routed(forward, len(forward.target.kinds) - 1)
    forward.follow(hidden.device)
    return forward.leave(hidden)


def _check_routed(forward: Forward, index: int) -> None:
    """Refuse a layer that attended without asking transformers for its kernel: nothing could act there."""
    if index not in forward.entered:
        raise unrouted(index)
