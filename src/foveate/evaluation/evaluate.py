"""`foveate eval`: from what the user wrote to a folder of rows, plots and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from foveate.asking.loading import GLIMPSE

from .accuracy import BASELINES, Answers, measure
from .jobs import Processes
from .results import Results, Row, write
from .tables import Table, table
from .workplace import Options, prepare, some


def evaluate(options: Options, *, out: Path | None, jobs: int, console: Console) -> tuple[Results, list[str]]:
    """Measure, and draw the plots. out: the folder of results. jobs: how many processes ask.

    Returns the results, and a line for each row of the data and each variant that could not be used.
    """
    opened: list[Results] = []  # before the model is loaded: a folder that holds something else is refused at once
    with console.status("loading, and preparing the questions"):
        place = prepare(options, lambda s: opened.append(Results(out, "eval", s, keys=("method", "keep"))))
    (results,), items = opened, place.batches.items
    for line in (*(f"left out: {line}" for line in place.left_out), *some(place.lost, ", see bad-rows.txt")):
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    Answers(results.folder / "answers.csv", items)  # refuses other questions before anything is written
    with results:
        if place.lost:
            write(results.folder / "bad-rows.txt", "\n".join(place.lost) + "\n")
        else:
            (results.folder / "bad-rows.txt").unlink(missing_ok=True)  # an earlier run's
        try:
            failures = measure(
                place.model,
                place.processor,
                place.batches,
                place.variants,
                results,
                groups=place.groups,
                match=options.match,
                max_new_tokens=options.max_new_tokens,
                seed=options.seed,
                more={"bad_rows": len(place.lost)} if options.data not in (None, GLIMPSE) else None,
                console=console,
                jobs=Processes(jobs, options) if jobs > 1 else None,
            )
            results.complete = not failures
            _draw(results, f"{options.model}: {len(items):,} questions", place.groups)
        except KeyboardInterrupt:
            line = f"stopped: {len(results.rows)} finished rows are in {results.folder}; the same command goes on there"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            raise
    return results, place.lost + failures


def _draw(results: Results, title: str, parts: dict[str, Any]) -> None:
    from .plots import curves, pareto

    rows = [row for row in results.rows if row["kept_share"] is not None]  # None: a guide answered all
    # Rows of an earlier release say what is held only, which is what a step reads unless it chooses.
    steps = "read_share" if all("read_share" in row for row in rows) else "kv_share"
    prices = {
        steps: (
            "",
            "KV cache that a step reads, % of the untouched model's"
            if steps == "read_share"
            else "KV cache behind the prefill, % of the untouched model's",
        ),
        "prefill_share": ("-prefill", "operations until the first token, % of the untouched model's"),
    }
    for x, (suffix, xlabel) in prices.items():
        for part in ("", *parts):
            y = f"accuracy:{part}" if part else "accuracy"
            name = f"{y.replace(':', '-')}{suffix}.png"
            if y in rows[0] and results.due(name):
                whole = f"{title}, {part.replace('_', ' ')}" if part else title
                curves(rows, results.folder / name, x=x, y=y, xlabel=xlabel, dashed=BASELINES, title=whole)
        if results.due(f"pareto{suffix}.png"):
            pareto(rows, results.folder / f"pareto{suffix}.png", x=x, xlabel=xlabel, title=title)


def overview(rows: Sequence[Row]) -> Table:
    """Right answers in %, by keep: to all questions, and to those whose answers are one word, and to longer ones."""
    parts = {"accuracy": "all", "accuracy:one_word": "one word", "accuracy:more_words": "more words"}
    columns = [name for name in parts if name in rows[0]]
    whole = table(rows, ["method", *columns], across="keep")
    keeps = (len(whole.head) - 1) // len(columns)
    titles = [parts[columns[i // keeps]] + " %" if i % keeps == 0 else "" for i in range(keeps * len(columns))]
    head = [f"{title}\n{long.rpartition(' ')[2]}" for title, long in zip(titles, whole.head[1:], strict=True)]
    return replace(whole, head=["right answers\nkeep", *head])
