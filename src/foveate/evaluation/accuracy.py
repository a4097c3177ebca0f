"""What pruning costs in right answers: one row a method and keep, beside the untouched model."""

from __future__ import annotations

import csv
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from foveate.asking.mistake import Mistake
from foveate.asking.notes import notes
from foveate.glimpse.happenings import CLIP_KINDS, STILL

from .cost import prefill_flops
from .partial import Partial
from .results import Results, Row, write_csv
from .runner import Batches, clips_said, generate
from .scores import exact_match, holds, interval

if TYPE_CHECKING:
    from foveate.asking.variant import Variant

    from .questions import Item

UNTOUCHED = "untouched"
HELD = ("tokens", "kept", "kv", "kv_full", "read")  # what is added up of each batch
# One for every place: a draw in the cache, when the prompt has read the picture, beats one before the LLM by far.
BASELINES = ("random", "uniform", "pooling", "random_layer", "random_cache", "random_cross")
MATCHES = {"exact": exact_match, "contains": holds}
# Of glimpse's kinds of questions: pruning breaks first what depends on one small place, and what is evicted behind the
# prefill changes an answer of one word only where the model goes on behind it, for the word itself is decided by then.
GROUPS = {
    "grounding": ("what", "where"),
    "reading": ("number", "word", "line"),
    "one_word": ("exists", "count", "total", "colour", "word", "which"),
    "more_words": ("what", "where", "number", "describe", "list", "line", "compare", "both", "again", "each"),
}
# Of its kinds of questions about clips: those that one frame cannot answer, and those that any frame answers.
CLIP_GROUPS = {"time": tuple(kind for kind in CLIP_KINDS if kind not in STILL), "still": STILL}


Answered = tuple[list[str], Row]


@dataclass(frozen=True)
class Failure:
    """What went wrong in another process."""

    error: Exception
    trace: str


class Jobs(Protocol):
    """Several processes that ask. count: how many."""

    count: int

    def run(self, variants: Sequence[Variant]) -> Iterator[tuple[Variant, Answered | Failure]]:
        """Ask all of them, each as it is done."""


def measure(
    model: Any,
    processor: Any,
    batches: Batches,
    variants: Sequence[Variant],
    results: Results,
    *,
    groups: dict[str, tuple[str, ...]],
    match: str = "exact",
    max_new_tokens: int = 64,
    seed: int = 0,
    more: Row | None = None,
    console: Console | None = None,
    jobs: Jobs | None = None,
) -> list[str]:
    """Ask every question of `batches` under the untouched model and every variant, a row in `results` for each.

    results: entered; rows that are there already are left alone. groups: types of questions that are also scored
    together. match: one of `MATCHES`. seed: of the bootstrap. more: further columns of every row. jobs: where variants
    are asked by several processes.

    What each variant said goes to `answers.csv`. A variant that fails costs the others nothing: its traceback goes to
    `errors.txt`.

    Returns a line for each variant that failed.
    """
    items = [batches.items[index] for index in sorted(set(range(len(batches.items))) - set(batches.refused))]
    console = console or notes()
    rows = _Rows(results, items, groups, match, seed, more or {}, console)
    due = [variant for variant in variants if not rows.have(variant)]
    with progress_bar(console) as progress:
        done = len(variants) - len(due) + rows.have(None)
        bar = progress.add_task("", total=(len(variants) + 1) * len(items), completed=done * len(items))

        def ask_here(variant: Variant | None) -> Answered:
            progress.update(bar, description=_column(variant))
            partial = Partial(results.folder / "partial.json", _column(variant))
            found = ask(model, processor, batches, variant, max_new_tokens, lambda n: progress.advance(bar, n), partial)
            partial.done()
            return found

        if not rows.have(None):
            try:
                rows.add(None, *ask_here(None))
            except Exception as error:
                raise advice(error) from error
        if jobs is not None and len(due) > 1:
            progress.update(bar, description=f"{jobs.count} processes")
            for variant, outcome in jobs.run(due):
                progress.advance(bar, len(items))
                rows.take(variant, outcome)
            due = []
        for variant in due:
            try:
                outcome = ask_here(variant)
            except Exception as error:
                outcome = Failure(advice(error), traceback.format_exc())
            rows.take(variant, outcome)
    labels = [UNTOUCHED, *dict.fromkeys(variant.label for variant in variants)]
    place = {label: index for index, label in enumerate(labels)}
    results.rows.sort(key=lambda row: place.get(row["method"], len(labels)))  # a folder that took more rows later
    return rows.failures


class _Rows:
    """The rows of a folder, as variants are done. failures: a line for each that has failed."""

    def __init__(
        self,
        results: Results,
        items: Sequence[Item],
        groups: dict[str, tuple[str, ...]],
        match: str,
        seed: int,
        more: Row,
        console: Console,
    ) -> None:
        self.results, self.items, self.match, self.seed, self.more = results, items, match, seed, more
        self.parts = {**groups, **{item.type: (item.type,) for item in items if item.type}}
        self.console, self.failures = console, list[str]()
        self.answers = Answers(results.folder / "answers.csv", items)

    def have(self, variant: Variant | None) -> bool:
        """Whether there is nothing to ask any more."""
        name, keep = _name(variant)
        there = self.results.find(method=name, keep=keep) is not None
        return there and (variant is not None or UNTOUCHED in self.answers.said)

    def take(self, variant: Variant, outcome: Answered | Failure) -> None:
        """Write down what became of a variant."""
        if not isinstance(outcome, Failure):
            self.add(variant, *outcome)
            return
        why = " ".join(str(outcome.error).split()) or type(outcome.error).__name__
        self.failures.append(f"{_column(variant)} failed: {why}")
        self.console.print(self.failures[-1], markup=False, highlight=False, soft_wrap=True)
        with (self.results.folder / "errors.txt").open("a") as file:
            file.write(f"{_column(variant)}\n{outcome.trace}\n")

    def add(self, variant: Variant | None, said: list[str], cost: Row) -> None:
        """Score what was said, and add the row."""
        name, keep = _name(variant)
        self.answers.add(_column(variant), said)
        if self.results.find(method=name, keep=keep):
            return
        matches = MATCHES[self.match]
        pairs = list(zip(said, self.items, strict=True))
        right = [any(matches(text, answer) for answer in item.answers) for text, item in pairs]
        same = [exact_match(*pair) for pair in zip(said, self.answers.said[UNTOUCHED], strict=True)]
        whole = self.results.find(method=UNTOUCHED, keep=None) or cost
        cost = {**cost, "prefill_share": cost["prefill_flops"] / whole["prefill_flops"]}
        row: Row = {"method": name, "keep": keep, "place": variant.place if variant else None}
        row |= {"questions": len(self.items), **self.more}
        row |= {**_scores("accuracy", right, self.seed), **cost, **_scores("agreement", same, self.seed)}
        for part, kinds in self.parts.items():
            for what, hits in (("accuracy", right), ("agreement", same)):
                some = [hit for hit, item in zip(hits, self.items, strict=True) if item.type in kinds]
                row |= _scores(f"{what}:{part}", some, self.seed)
        self.results.add(row)
        if not self.console.is_terminal:  # a bar would not be seen
            line = f"{_column(variant)}: {100 * row['accuracy']:.1f} %"
            self.console.print(line, markup=False, highlight=False)


def _name(variant: Variant | None) -> tuple[str, float | int | None]:
    return (variant.label, variant.keep) if variant else (UNTOUCHED, None)


def _column(variant: Variant | None) -> str:
    return f"{variant.label} keep={variant.keep}" if variant else UNTOUCHED


class Answers:
    """`answers.csv`: a line a question, a column for what each variant said.

    Raises:
        Mistake: when the file holds other questions.
    """

    def __init__(self, path: Path, items: Sequence[Item]) -> None:
        self.path = path
        self._questions = [
            {"type": item.type or "", "question": " | ".join(item.asked), "accepted": " | ".join(item.answers)}
            for item in items
        ]
        self.said: dict[str, list[str]] = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                lines = list(csv.DictReader(file))
            if [{name: line.get(name) for name in self._questions[0]} for line in lines] != self._questions:
                raise Mistake(f"{path} holds answers to other questions: give another --out")
            self.said = {name: [line[name] for line in lines] for name in lines[0] if name not in self._questions[0]}

    def add(self, column: str, said: list[str]) -> None:
        """Write one more column."""
        self.said[column] = said
        lines = [
            {**question, **{name: texts[index] for name, texts in self.said.items()}}
            for index, question in enumerate(self._questions)
        ]
        write_csv(self.path, lines)


def ask(
    model: Any,
    processor: Any,
    batches: Batches,
    variant: Variant | None,
    max_new_tokens: int,
    advance: Callable[[int], object],
    partial: Partial | None = None,
) -> Answered:
    """The answers of one variant (None: the untouched model), and what they cost.

    advance: called after each batch with the number of its questions. partial: what an interrupted run knows already.
    """
    import foveate

    partial = partial or Partial(None, "")
    with foveate.prune(model, variant.methods) if variant else nullcontext() as pruned:
        # A guide that answers alone leaves no cache behind.
        exits = any(getattr(m, "exit_threshold", None) is not None for m in (variant.methods if variant else ()))
        around = clips_said(pruned)
        answers: dict[int, str] = {}
        cost = dict.fromkeys((*HELD, "seconds"), 0.0)
        for batch in batches:
            row = partial.get(batch)
            if row is None:
                row, begun = dict.fromkeys(HELD, 0.0), time.perf_counter()

                def after(row: Row = row) -> None:
                    row.update(_held(pruned.report if pruned is not None else None))

                texts = generate(model, processor, [batch], max_new_tokens, after, one_cache=not exits, around=around)
                row |= {"said": texts, "seconds": time.perf_counter() - begun}
                partial.add(batch, row)
            answers.update(zip(sorted(batch.indices), row["said"], strict=True))
            cost = {name: value + row[name] for name, value in cost.items()}
            advance(len(batch.indices))
        middle = batches.middle
        with around(middle):
            flops = prefill_flops(model, middle.inputs.to(model.device, model.dtype))
    whole = None if variant else 1.0  # nothing pruned: the guide has answered everything
    return [answers[index] for index in sorted(answers)], {
        "kept_share": cost["kept"] / cost["tokens"] if cost["tokens"] else whole,
        "kv_share": cost["kv"] / cost["kv_full"] if cost["kv_full"] else whole,
        "read_share": cost["read"] / cost["kv_full"] if cost["kv_full"] else whole,
        "prefill_flops": flops,
        "seconds": round(cost["seconds"], 2),
    }


def _held(report: Any) -> Row:
    """Of one prefill: image tokens, those that stayed, bytes, bytes if nothing had gone, and those that a step reads.

    report: None where nothing was pruned: it is the untouched model, or the guide has answered.
    """
    if report is None:
        return {}
    images = [image for sample in report.images for image in sample]
    share = 1.0 if report.decoding is None else report.decoding.share
    values = (
        *(sum(tokens for tokens, _ in images), sum(kept for _, kept in images)),
        *(report.kv_bytes, report.kv_bytes_unpruned, report.kv_bytes * share),
    )
    return dict(zip(HELD, values, strict=True))


def _scores(name: str, hits: Sequence[bool], seed: int) -> Row:
    """The share of hits and its 95 % interval, as three columns."""
    what, colon, part = name.partition(":")
    if not hits:
        return {}
    low, high = interval(hits, seed=seed)
    return {name: sum(hits) / len(hits), f"{what}_low{colon}{part}": low, f"{what}_high{colon}{part}": high}


def advice(error: Exception) -> Exception:
    """The error, or what to do about it."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return Mistake("the device is out of memory: lower --batch-size or --max-new-tokens, or use --dtype bfloat16")
    return error


def progress_bar(console: Console) -> Progress:
    """What is done and the time left, where somebody sees it."""
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
