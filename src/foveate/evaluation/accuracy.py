"""What pruning costs in right answers: one row a method and keep, beside the untouched model."""

from __future__ import annotations

import csv
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from foveate.asking.mistake import Mistake

from .results import Results, Row, write_csv
from .runner import Batches, generate
from .scores import exact_match, holds, interval

if TYPE_CHECKING:
    from foveate.asking.options import Variant

    from .questions import Item

UNTOUCHED = "untouched"
# One for every place: a draw in the cache, when the prompt has read the picture, beats one before the LLM by far.
BASELINES = ("random", "uniform", "pooling", "random_layer", "random_cache", "random_cross")
MATCHES = {"exact": exact_match, "contains": holds}
# Pruning breaks what depends on one small place first. Of glimpse's kinds of questions:
GROUPS = {
    "grounding": ("what", "where"),
    "reading": ("number", "word"),
    "rest": ("exists", "count", "total", "colour", "describe"),
}


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
) -> list[str]:
    """Ask every question of `batches` under the untouched model and every variant, a row in `results` for each.

    results: entered; rows that are there already are left alone. groups: types of questions that are also scored
    together. match: one of `MATCHES`. seed: of the bootstrap. more: further columns of every row.

    What each variant said goes to `answers.csv`. A variant that fails costs the others nothing: its traceback goes to
    `errors.txt`.

    Returns a line for each variant that failed.
    """
    items = [batches.items[index] for index in sorted(set(range(len(batches.items))) - set(batches.refused))]
    types = dict.fromkeys(item.type for item in items if item.type)
    parts = {**groups, **{kind: (kind,) for kind in types}}
    console = console or Console(stderr=True)
    failures = []
    with _progress(console) as progress:
        answers = Answers(results.folder / "answers.csv", items)
        bar = progress.add_task("", total=(len(variants) + 1) * len(batches))
        for done, variant in enumerate([None, *variants]):
            name, keep = (variant.label, variant.keep) if variant else (UNTOUCHED, None)
            column = f"{name} keep={keep}" if variant else name
            progress.update(bar, description=column, completed=done * len(batches))
            finished = results.find(method=name, keep=keep) is not None
            if finished and (variant or column in answers.said):
                continue
            try:
                said, cost = _ask(model, processor, batches, variant, max_new_tokens, lambda: progress.advance(bar))
            except Exception as error:
                if variant is None:
                    raise _advice(error) from error
                failures.append(f"{column} failed: {' '.join(str(_advice(error)).split()) or type(error).__name__}")
                console.print(failures[-1], markup=False, highlight=False, soft_wrap=True)
                with (results.folder / "errors.txt").open("a") as file:
                    file.write(f"{column}\n{traceback.format_exc()}\n")
                continue
            answers.add(column, said)
            if finished:
                continue
            right = [
                any(MATCHES[match](text, answer) for answer in item.answers)
                for text, item in zip(said, items, strict=True)
            ]
            same = [exact_match(*pair) for pair in zip(said, answers.said[UNTOUCHED], strict=True)]
            row: Row = {"method": name, "keep": keep, "place": variant.method.place if variant else None}
            row |= {"questions": len(items), **(more or {}), **_scores("accuracy", right, seed), **cost}
            row |= _scores("agreement", same, seed)
            for part, kinds in parts.items():
                row |= _scores(
                    f"accuracy:{part}", [r for r, i in zip(right, items, strict=True) if i.type in kinds], seed
                )
            results.add(row)
            if not console.is_terminal:  # a bar would not be seen
                console.print(f"{column}: {100 * row['accuracy']:.1f} %", markup=False, highlight=False)
    labels = [UNTOUCHED, *dict.fromkeys(variant.label for variant in variants)]
    place = {label: index for index, label in enumerate(labels)}
    results.rows.sort(key=lambda row: place.get(row["method"], len(labels)))  # a folder that took more rows later
    return failures


class Answers:
    """`answers.csv`: a line a question, a column for what each variant said.

    Raises:
        Mistake: when the file holds other questions.
    """

    def __init__(self, path: Path, items: Sequence[Item]) -> None:
        self.path = path
        self._questions = [
            {"type": item.type or "", "question": item.question, "accepted": " | ".join(item.answers)} for item in items
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


def _ask(
    model: Any, processor: Any, batches: Batches, variant: Variant | None, max_new_tokens: int, advance: Any
) -> tuple[list[str], Row]:
    """The answers of one variant, and what they cost."""
    import foveate

    counts = {"tokens": 0, "kept": 0, "kv": 0, "kv_full": 0}

    def after() -> None:
        advance()
        if variant is None:
            return
        report: Any = pruned.report  # type: ignore[union-attr]
        if report is None:  # nothing was pruned: the guide has answered
            return
        for tokens, kept in (image for sample in report.images for image in sample):
            counts["tokens"] += tokens
            counts["kept"] += kept
        counts["kv"] += report.kv_bytes
        counts["kv_full"] += report.kv_bytes_unpruned

    begun = time.perf_counter()
    with foveate.prune(model, variant.method) if variant else nullcontext() as pruned:
        said = generate(model, processor, batches, max_new_tokens, after)
    whole = None if variant else 1.0  # nothing pruned: the guide has answered everything
    cost = {
        "kept_share": counts["kept"] / counts["tokens"] if counts["tokens"] else whole,
        "kv_share": counts["kv"] / counts["kv_full"] if counts["kv_full"] else whole,
        "seconds": round(time.perf_counter() - begun, 2),
    }
    return said, cost


def _scores(name: str, hits: Sequence[bool], seed: int) -> Row:
    """The share of hits and its 95 % interval, as three columns."""
    what, colon, part = name.partition(":")
    if not hits:
        return {}
    low, high = interval(hits, seed=seed)
    return {name: sum(hits) / len(hits), f"{what}_low{colon}{part}": low, f"{what}_high{colon}{part}": high}


def _advice(error: Exception) -> Exception:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return Mistake("the device is out of memory: lower --batch-size or --max-new-tokens, or use --dtype bfloat16")
    return error


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
