"""Between transformers and its attention kernels: routing of marked modules."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError
from .upstream import AttentionInterface, untraced

Kernel = Callable[..., tuple[Tensor, Tensor | None]]
Handler = Callable[..., tuple[Tensor, Tensor | None]]

_MARK = "_foveate_route"
# Weak, and the handler stands on the module itself: a model that nobody holds any more is freed with its handlers.
_routed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_lock = threading.Lock()
_original: Any = None


def _dispatch(kernel: Kernel, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    handler = module.__dict__.get(_MARK)
    return kernel(module, *args, **kwargs) if handler is None else _handle(handler, kernel, module, *args, **kwargs)


@untraced
def _handle(handler: Handler, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return handler(*args, **kwargs)


def _get_interface(self: AttentionInterface, attn_implementation: str, default: Kernel) -> Kernel:
    return functools.partial(_dispatch, _original(self, attn_implementation, default))


def add_routes(routes: dict[nn.Module, Handler]) -> None:
    """Send the attention of these modules through their handlers, `handler(kernel, module, query, ...)`.

    The lookup of kernels is shadowed while any route exists, instead of any registry entry: names, masks and
    "eager" (which is no entry) keep their meaning, and modules without a route get their kernel unchanged.
    """
    global _original
    if not routes:
        return
    with _lock:
        if any(_MARK in module.__dict__ for module in routes):
            raise UnsupportedError("another pruned model shares attention modules with this one; remove() that first")
        if AttentionInterface.get_interface is not _get_interface:
            _original = AttentionInterface.get_interface
            AttentionInterface.get_interface = _get_interface  # type: ignore[method-assign]
        for module, handler in routes.items():
            module.__dict__[_MARK] = handler
            _routed.add(module)


def remove_routes(modules: Iterable[nn.Module]) -> None:
    """Undo `add_routes`; with the last route the lookup is what it was before the first."""
    with _lock:
        for module in modules:
            module.__dict__.pop(_MARK, None)
            _routed.discard(module)
        if not _routed and AttentionInterface.get_interface is _get_interface:
            AttentionInterface.get_interface = _original  # type: ignore[method-assign]
