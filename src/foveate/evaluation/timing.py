"""The clock of `foveate bench`: one `generate()`, split into vision, selection, prefill and decoding steps."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.upstream import held_layers

# What a method computes, in any place: once for a prompt, and in every step of decoding.
SELECTION = ("choose", "observe", "score", "statistics", "budgets", "select", "merge")
CHOOSING = ("score", "select", "remember")


@dataclass(frozen=True)
class Timing:
    """One `generate()`, in seconds. total: until the last token. peak_bytes: None where the device does not say.

    selection: what the method computes for the prompt; choosing: for all steps of decoding together.
    """

    first: float
    vision: float
    selection: float
    steps: tuple[float, ...]
    total: float
    peak_bytes: int | None
    choosing: float = 0.0

    @property
    def prefill(self) -> float:
        """What is left of the time to the first token: the LLM's prefill, and generate()'s own work."""
        return self.first - self.vision - self.selection


class Stopwatch:
    """Adds up the time spent in named spans; a span inside another one does not count for the outer one.

    On CUDA it records events on the stream and reads them once at the end, so that measuring stalls nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._open: list[int] = []
        self._spans: list[tuple[str, int | None, Any, Any]] = []  # name, the span around it, start, end

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed. Its signature stays readable, as generate() wants it."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            around, mine, begun = (self._open[-1] if self._open else None), len(self._spans), self._mark()
            self._spans.append((name, around, begun, begun))
            self._open.append(mine)
            try:
                return function(*args, **kwargs)
            finally:
                self._open.pop()
                self._spans[mine] = (name, around, begun, self._mark())

        return timed

    def read(self) -> dict[str, float]:
        """Seconds of each span since the last reading."""
        synchronize(self.device)
        total: dict[str, float] = {}
        for name, around, begun, ended in self._spans:
            spent = begun.elapsed_time(ended) / 1000 if self.device.type == "cuda" else ended - begun
            total[name] = total.get(name, 0.0) + spent
            if around is not None:
                total[self._spans[around][0]] -= spent
        self._spans.clear()
        return total

    def _mark(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        synchronize(self.device)
        return time.perf_counter()


@contextmanager
def watched(watch: Stopwatch, family: Any, base: Any, methods: Sequence[Any]) -> Iterator[None]:
    """Time the vision encoder of a model, and the computations of method objects, inside the block."""
    encoders = [(base, name) for name in ("get_image_features", "get_video_features") if hasattr(base, name)]
    if "encoder" not in family.places:
        encoders = [(base.vision_model, "forward")]
    spans = [(*encoder, "vision") for encoder in encoders]
    for method in methods:
        steps = CHOOSING if method.place == "decode" else ()
        spans += [(method, name, "choosing") for name in steps]
        spans += [(method, name, "selection") for name in SELECTION if name not in steps and hasattr(method, name)]
    before = [(thing, name, vars(thing).get(name)) for thing, name, _ in spans]
    try:
        for thing, name, span in spans:
            setattr(thing, name, watch.wrap(span, getattr(thing, name)))
        yield
    finally:
        for thing, name, old in before:
            delattr(thing, name) if old is None else setattr(thing, name, old)


@contextmanager
def no_collector() -> Iterator[None]:
    """Keep Python's garbage collector from running by itself inside the block, and make `gc.collect()` cheap."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    gc.freeze()  # what is there already need not be looked at again
    try:
        yield
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()


def time_generate(model: Any, inputs: dict[str, Any], new_tokens: int, watch: Stopwatch) -> Timing:
    """Run greedy `generate()` once and time it, best inside `no_collector()`. new_tokens: at least 2."""
    device, ticks = watch.device, _Ticks()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    watch.read()
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=new_tokens, streamer=ticks)
    spans = watch.read()
    first, *rest = ticks.at[1:]  # the first is the prompt
    steps = tuple(end - begin for begin, end in zip([first, *rest], rest, strict=False))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Timing(
        first - start,
        spans.get("vision", 0.0),
        spans.get("selection", 0.0),
        steps,
        ticks.at[-1] - start,
        peak,
        spans.get("choosing", 0.0),
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def cache_bytes(cache: Any) -> int:
    """Memory that a KV cache really holds: whole storages, so that a view of a large one counts as large."""
    tensors = [t for layer in held_layers(cache).values() for t in (layer.keys, layer.values)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


class _Ticks:
    """A streamer that notes when tokens arrive on the CPU: the device has finished them."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Any) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None: ...
