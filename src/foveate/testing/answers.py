"""Whether a method answers what it was asked: looks on whenever the engine asks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.methods.base import (
    CacheMethod,
    CrossMethod,
    DepthMethod,
    EncoderMethod,
    ImageGroups,
    LayerMethod,
    LayerTokens,
    Method,
    VideoMethod,
)
from foveate.methods.tokens import EncoderTokens, VideoTokens


@contextmanager
def watched(method: Method) -> Iterator[None]:
    """Raise AssertionError with a sentence where what the method chooses is not what its base class asks for."""
    rules: dict[type[Method], tuple[str, Callable[..., None]]] = {
        VideoMethod: ("choose", _clips),
        EncoderMethod: ("select", _tiles),
        LayerMethod: ("select", _groups),
        DepthMethod: ("select", _routed),
        CacheMethod: ("select", _entries),
        CrossMethod: ("select", _features),
    }
    found = [rule for base, rule in rules.items() if isinstance(method, base)]
    if not found:
        yield
        return
    name, rule = found[0]
    choose = getattr(method, name)

    def looked_at(*args: Any) -> Any:
        answer = choose(*args)
        rule(answer, *args)
        return answer

    with _instead(method, name, looked_at):
        yield


@contextmanager
def _instead(method: Method, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let one method object answer through another function."""
    before = vars(method).get(name)
    setattr(method, name, function)
    try:
        yield
    finally:
        delattr(method, name) if before is None else setattr(method, name, before)


def _mask(answer: Any, shape: tuple[int, ...], of: str, name: str = "select") -> Tensor:
    if not isinstance(answer, Tensor):
        raise AssertionError(f"{name} returned {type(answer).__name__} where a tensor of booleans is wanted")
    if answer.dtype != torch.bool:
        kind = str(answer.dtype).removeprefix("torch.")
        raise AssertionError(f"{name} returned {kind} where booleans are wanted: True for each token that stays")
    if answer.shape != shape:
        raise AssertionError(f"{name} returned booleans of shape {tuple(answer.shape)} where {of} is {shape}")
    return answer


def _within(kept: Tensor, budget: Tensor, whole: int, name: str = "select") -> None:
    """whole: what may stay together even beyond the budget, such as a row of the picture."""
    if (kept > budget.clamp(min=whole)).any():
        worst = int((kept - budget).argmax())
        asked, over = int(budget.flatten()[worst]), int(kept.flatten()[worst])
        raise AssertionError(f"{name} keeps {over} tokens where the budget is {asked}")
    if (kept < 1).any():
        raise AssertionError(f"{name} keeps nothing of an image, of which something must always stay")


def _tiles(answer: Any, tokens: EncoderTokens, budget: Tensor) -> None:
    rows, columns = tokens.grid
    kept = _mask(answer, (tokens.tiles, rows * columns), "(tiles, n)").sum(-1)
    _within(kept, budget, columns)


def _clips(answer: Any, tokens: VideoTokens, budget: Tensor) -> None:
    shape = (tokens.clips, tokens.frames, tokens.n)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise AssertionError("choose must return two: which tokens stay, and what they become or None")
    kept = _mask(answer[0], shape, "(clips, frames, n)", "choose").sum((1, 2))
    _within(kept, budget, 1, "choose")


def _groups(answer: Any, tokens: LayerTokens) -> None:
    chosen = _mask(answer, tuple(tokens.groups.positions.shape), "(groups, n)")
    _present(chosen, tokens.groups)


def _routed(answer: Any, states: Tensor, groups: ImageGroups, layer: int) -> None:
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise AssertionError("select must return two: which tokens go through, and their weight or None")
    _present(_mask(answer[0], tuple(groups.positions.shape), "(groups, n)"), groups)


def _present(chosen: Tensor, groups: ImageGroups) -> None:
    if (chosen & ~groups.present).any():
        raise AssertionError("select keeps what is no token: padding of a shorter image (see ImageGroups.present)")


def _entries(answer: Any, scores: Tensor, budget: Tensor) -> None:
    counts = _mask(answer, (*scores.shape[:2], scores.shape[-1]), "(groups, kv_heads or 1, n)").sum(-1)
    if (counts != counts[:, :1]).any():
        raise AssertionError("select keeps more tokens in some heads than in others")
    _within(counts[:, 0], budget, 1)


def _features(answer: Any, attention: Tensor, valid: Tensor, images: Tensor) -> None:
    if (_mask(answer, tuple(valid.shape), "(batch, n)") & ~valid).any():
        raise AssertionError("select keeps features of padded tiles")


class Merges:
    """What the method made of the tokens that it kept, as it was asked for, call by call.

    calls: the tokens it was asked about, which of them it kept, and what those became.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Tensor, Tensor]] = []

    @contextmanager
    def noted(self, method: Method) -> Iterator[None]:
        """Look on while the engine asks this method."""
        name = "choose" if isinstance(method, VideoMethod) else "merge"
        with _instead(method, name, partial(self._note, getattr(method, name))):
            yield

    def _note(self, ask: Callable[..., Any], tokens: Any, *args: Any) -> Any:
        answer = ask(tokens, *args)
        if isinstance(answer, tuple):  # of one frame each: a picture
            kept, becomes = answer
            if becomes is not None:
                self.calls.append((tokens, kept[:, 0].clone(), becomes[:, 0].clone()))
        elif answer is not None:
            self.calls.append((tokens, args[0].clone(), answer.clone()))
        return answer
