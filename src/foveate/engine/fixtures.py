"""What pruning puts on a model, and how all of it comes off again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from .routes import Handler, add_routes, remove_routes
from .upstream import untraced

Wrapper = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class NotPickled:
    """What hangs on a pruned model and must not go with it into a file."""

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            "a pruned model cannot be pickled (torch.save of the whole model): call remove() first, or save its "
            "weights with save_pretrained or state_dict"
        )


class Fixtures:
    """Hooks, wrapped methods and routed attention modules of one pruned model."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._replaced: list[tuple[Any, str, Any, Any]] = []
        self._routed: list[nn.Module] = []

    def __bool__(self) -> bool:
        return bool(self._handles)

    def hook(self, handle: Any) -> None:
        """Keep the handle of a hook."""
        self._handles.append(handle)

    def wrap(self, module: Any, name: str, wrapper: Wrapper) -> None:
        """Replace a method of a module by `wrapper(original, args, kwargs)`."""
        original, replaced = getattr(module, name), self._replaced

        # generate() reads signatures to know what to pass.
        @untraced
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if all(each[3] is not wrapped for each in replaced):  # removed, but under a later patch of somebody else
                return original(*args, **kwargs)
            return wrapper(original, args, kwargs)

        replaced.append((module, name, module.__dict__.get(name), wrapped))
        setattr(module, name, wrapped)

    def route(self, routes: dict[nn.Module, Handler]) -> None:
        """Send the attention of these modules through handlers."""
        add_routes(routes)
        self._routed += routes

    def remove(self) -> None:
        """Take everything off; harmless when done already."""
        remove_routes(self._routed)
        for handle in self._handles:
            handle.remove()
        # The last first: a method may have been wrapped twice.
        for module, name, previous, wrapped in reversed(self._replaced):
            if module.__dict__.get(name) is not wrapped:
                continue  # patched since, or unpatched, by somebody else: theirs to keep
            if previous is None:
                delattr(module, name)
            else:
                setattr(module, name, previous)
        self._handles, self._routed = [], []
        self._replaced.clear()
