"""What pruning saves in time and memory: a row a method, keep and batch size, beside the untouched and the ideal model.

The three run in turn in one process, on the same weights and inputs, so that a busy moment hits all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import foveate

from ..engine.upstream import cache_behind
from .ideal import SHORTENS, Plan, ideal
from .results import Results, Row
from .timing import Stopwatch, Timing, cache_bytes, no_collector, quartiles, time_generate, watched

if TYPE_CHECKING:
    from foveate.asking.variant import Variant
    from foveate.methods.base import Method

KEYS = ("method", "keep", "batch")
Setting = Callable[[], AbstractContextManager[Any]]  # what a variant runs in


@dataclass
class Case:
    """One variant of the model. setting: installs it. kv_bytes: what its cache holds behind the prefill."""

    setting: Setting
    kv_bytes: int = 0
    timings: list[Timing] = field(default_factory=list)

    @property
    def first(self) -> list[float]:
        """Seconds to the first token, of each run."""
        return [timing.first for timing in self.timings]

    @property
    def steps(self) -> list[float]:
        """Seconds of the decoding steps of all runs."""
        return [step for timing in self.timings for step in timing.steps]

    def columns(self, prefix: str, tokens: int) -> Row:
        """Medians and quartiles of what was measured, named `prefix` + ... tokens: that a run decodes in all."""
        row: Row = {}
        for name, values in (("ttft", self.first), ("decode", self.steps)):
            low, middle, high = (round(1000 * value, 4) for value in quartiles(values))
            row |= {f"{name}_ms": middle, f"{name}_q1_ms": low, f"{name}_q3_ms": high}
        for name in ("vision", "selection", "prefill"):
            row[f"{name}_ms"] = round(1000 * quartiles([getattr(t, name) for t in self.timings])[1], 4)
        row["choosing_ms"] = round(1000 * quartiles([t.choosing / len(t.steps) for t in self.timings])[1], 4)
        row["tokens_per_s"] = round(tokens / quartiles([t.total for t in self.timings])[1], 3)
        peaks = [t.peak_bytes for t in self.timings if t.peak_bytes is not None]
        row |= {"kv_bytes": self.kv_bytes, "peak_bytes": max(peaks, default=None)}
        return {prefix + name: value for name, value in row.items()}


def token_layers(report: Any, places: Sequence[str]) -> float:
    """Through how many of the layers an image token goes in the prefill, mean over all, as a share of the layers.

    report: of a run with `record=True`, of methods that shorten the prefill. places: where methods act.
    """
    if SHORTENS.isdisjoint(places):
        return 1.0
    kind = "cross" if any(layer.kind == "cross" for layer in report.layers) else "self"
    layers = [layer.seen[:, 0] for layer in report.layers if layer.kind == kind]
    images = [(row, image.positions) for row, images in enumerate(report.image_tokens) for image in images]
    passed = sum(int(seen[row, at.to(seen.device)].sum()) for seen in layers for row, at in images)
    return passed / (len(layers) * sum(len(at) for _, at in images))


class Bench:
    """A model and its inputs at one batch size.

    inputs: of `generate()`, on the model's device. new_tokens: decoded in every run, at least 2. repeat: timed runs of
    each variant, after one that warms up. clips: as `Pruned.clips` takes it; None where there is nothing to say.
    """

    def __init__(
        self, model: Any, inputs: dict[str, Any], *, new_tokens: int, repeat: int, clips: int | None = None
    ) -> None:
        family = foveate.get_family(model.config)
        assert family is not None
        self.model, self.family, self.base, self.inputs = model, family, family.base(model), inputs
        self.batch, self.length = inputs["input_ids"].shape
        self.new_tokens, self.repeat, self.clips = new_tokens, repeat, clips
        self.watch = Stopwatch(model.device)
        shown = (self.family.image_token_id(model.config), self.family.video_token_id(model.config))
        is_image = torch.isin(
            inputs["input_ids"], torch.tensor([i for i in shown if i is not None], device=model.device)
        )
        self.start = int(is_image.int().argmax(1).max())  # where the image has begun in every sample

    def measure(self, methods: Method | Sequence[Method], advance: Callable[[], None] = lambda: None) -> Row:
        """The row of a method, or of several that act together, without its keys.

        advance: called after the warm-up and after each turn.

        Raises:
            foveate.UnsupportedError: where a method cannot act on this model.
        """
        methods = tuple(methods) if isinstance(methods, Sequence) else (methods,)
        places = [method.place for method in methods]
        pruned = Case(lambda: self._pruned(methods))
        # What those that shorten the prefill leave by themselves: behind the others, reports show what these evicted.
        first = tuple(method for method in methods if method.place in SHORTENS)
        through = None
        if first and first != methods:
            with self._pruned(first, record=True) as session:
                self._warm_up()
                through = session.report
        with self._pruned(methods, record=True) as session:
            held = self._warm_up()
            report = session.report
            pruned.kv_bytes = max(held, report.kv_bytes)  # a report may know of a cache that generate() does not return
        untouched = best = Case(self._untouched, self._untouched_bytes)
        plan = Plan.of(report, places, self.start, through)
        cases = [untouched, pruned]
        if plan.shortens_prefill or plan.shortens_cache:
            best = Case(lambda: self._ideal(plan))
            with best.setting():
                best.kv_bytes = self._warm_up()
            cases.append(best)
        advance()
        with no_collector():
            for turn in range(self.repeat):
                for case in cases if turn % 2 == 0 else reversed(cases):
                    with case.setting():
                        case.timings.append(time_generate(self.model, self.inputs, self.new_tokens, self.watch))
                advance()
        images = [image for sample in report.images for image in sample]
        tokens = self.batch * self.new_tokens
        return {
            "place": "+".join(places),
            "prompt_tokens": self.length,
            "image_tokens": images[0][0],
            "kept_tokens": sum(kept for _, kept in images) / len(images),
            "kept_share": sum(kept for _, kept in images) / sum(tokens for tokens, _ in images),
            "token_layers": token_layers(through or report, places),
            "kv_share": pruned.kv_bytes / untouched.kv_bytes,
            "read_share": (1.0 if report.decoding is None else report.decoding.share)
            * pruned.kv_bytes
            / untouched.kv_bytes,
            **pruned.columns("", tokens),
            **untouched.columns("untouched_", tokens),
            **best.columns("ideal_", tokens),
            **_compare("ttft", pruned.first, untouched.first, best.first, plan.shortens_prefill),
            **_compare("decode", pruned.steps, untouched.steps, best.steps, plan.shortens_cache),
        }

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        with watched(self.watch, self.family, self.base, ()):
            yield

    @contextmanager
    def _pruned(self, methods: Sequence[Method], record: bool = False) -> Iterator[Any]:
        with (
            foveate.prune(self.model, methods, record=record) as session,
            watched(self.watch, self.family, self.base, session.methods),  # as it acts on this model
            nullcontext() if self.clips is None else session.clips(self.clips),
        ):
            yield session

    @contextmanager
    def _ideal(self, plan: Plan) -> Iterator[None]:
        with ideal(self.family, self.base, plan), self._untouched():
            yield

    @cached_property
    def _untouched_bytes(self) -> int:
        return self._warm_up()

    def _warm_up(self) -> int:
        """Run once, untimed; returns what the cache holds right behind the prefill."""
        held: list[int] = []

        def note(module: Any, args: Any, output: Any) -> None:
            held.append(cache_bytes(cache_behind(output)))

        handle = self.model.register_forward_hook(note)
        try:
            with torch.inference_mode():
                self.model.generate(**self.inputs, do_sample=False, num_beams=1, max_new_tokens=3)
        finally:
            handle.remove()
        return held[0]


def _compare(name: str, ours: list[float], plain: list[float], best: list[float], shortened: bool) -> Row:
    """Medians of the ratios of runs in the same turn, and the share of the ideal gain: None where noise hides it.

    Fewer than three values show no noise.
    """
    (p1, p2, p3), (b1, b2, b3) = quartiles(plain), quartiles(best)
    gain, noise = p2 - b2, max(p3 - p1, b3 - b1)
    clear = shortened and len(plain) >= 3 and gain > 2 * noise
    share = round((p2 - quartiles(ours)[1]) / gain, 4) if clear else None
    row: Row = {}
    for other, values in (("untouched", plain), ("ideal", best)):
        row[f"{name}_vs_{other}"] = round(quartiles([a / b for a, b in zip(ours, values, strict=True)])[1], 4)
    return {**row, f"{name}_gain_share": share}


def run(
    make: Callable[[int], Bench],
    variants: Sequence[Variant],
    batches: Sequence[int],
    results: Results,
    console: Console,
) -> list[str]:
    """Measure every variant at every batch size, a row in `results` for each; returns a line for each left out.

    make: the bench at a batch size. results: entered. Rows that are there already are left alone.
    """
    left_out = []
    with _progress(console) as progress:
        bar = progress.add_task("", total=None)
        for number, batch in enumerate(batches):
            bench = None
            for done, variant in enumerate(variants, number * len(variants)):
                if results.find(method=variant.label, keep=variant.keep, batch=batch):
                    continue
                what = f"{variant.label} keep={variant.keep} batch={batch}"
                try:
                    bench = bench or make(batch)
                    rounds = bench.repeat + 1
                    progress.update(
                        bar, description=what, completed=done * rounds, total=len(batches) * len(variants) * rounds
                    )
                    row = bench.measure(variant.methods, lambda: progress.advance(bar))
                except (foveate.UnsupportedError, ValueError) as error:
                    left_out.append(f"{what}: {' '.join(str(error).split())}")
                except torch.OutOfMemoryError:
                    left_out.append(f"{what}: out of memory")
                    torch.cuda.empty_cache()
                else:
                    results.add({"method": variant.label, "keep": variant.keep, "batch": batch, **row})
                    if not console.is_terminal:  # a bar would not be seen
                        console.print(f"{what}: {summary(row)}", markup=False, highlight=False, soft_wrap=True)
    return left_out


def summary(row: Row) -> str:
    """A row in a few words."""
    parts = []
    for name, what in (("ttft", "first token"), ("decode", "step")):
        share = row[f"{name}_gain_share"]
        reached = "" if share is None else f", {share:.0%} of the ideal gain"
        parts.append(f"{what} {row[f'{name}_ms']:.4g} ms ({row[f'{name}_vs_untouched']:.2f}x untouched{reached})")
    return "; ".join([*parts, f"KV {row['kv_share']:.0%}"])


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
