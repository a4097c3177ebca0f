"""What pruning costs in right answers: exact match of glimpse on held-out questions, by method and keep.

python benchmarks/accuracy.py

Writes accuracy.md, accuracy.json and accuracy.csv. Runs offline, on two CPU cores in about ten minutes.
"""

import argparse
import csv
import json
import platform
import sys
import time
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track

import foveate
from foveate import glimpse
from foveate.evaluation import exact_match, generate, interval, prepare

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "FoPru (rank)": ("fopru", {"strategy": "rank"}),
    "FoPru (row)": ("fopru", {"strategy": "row"}),
    "PLPHP": ("plphp", {}),
    "FastV": ("fastv", {}),
    "random": ("random", {}),
    "uniform": ("uniform", {}),
}
KEEPS = (1.0, 0.5, 0.25, 0.1)
GROUPS = {
    "grounding": ("what", "where", "exists", "colour"),
    "counting": ("count", "total"),
    "reading": ("number", "word"),
    "describing": ("describe",),
}
NOTES = """\
- untouched: the model without foveate, beside every method at keep 1.0.
- all: share of exact matches in %, and its 95 % bootstrap interval over questions.
- grounding: what is at a place, where is a thing, is it there, what colour is it. counting: how many of a kind,
  of all things. reading: the printed number or word. describing: every thing with its place.
- FastV sees all tokens in its first two layers, PLPHP in the whole prefill; FoPru, random and uniform drop them
  before the language model.
- Trimmed-Llama is not in the table: it prunes cross-attention features (mllama), and glimpse is a LLaVA.
"""


def measure(count: int, batch_size: int) -> list[dict[str, Any]]:
    """One row a method and keep, from the same prepared inputs."""
    model, processor = glimpse.load()
    questions = glimpse.heldout(count)
    batches = prepare(processor, [item.image for item in questions], [item.question for item in questions], batch_size)
    runs = [("untouched", None, {}, 1.0)]
    runs += [(label, name, more, keep) for label, (name, more) in METHODS.items() for keep in KEEPS]
    rows = []
    for label, name, more, keep in track(runs, description="methods"):
        begun = time.perf_counter()
        with nullcontext() if name is None else foveate.prune(model, name, keep=keep, **more):
            said = generate(model, processor, batches, max_new_tokens=40)
        hits = [exact_match(text, item.answer) for text, item in zip(said, questions, strict=True)]
        row = {"method": label, "keep": keep, "all": sum(hits) / count}
        row["low"], row["high"] = interval(hits)
        for group, kinds in {**GROUPS, **{kind: (kind,) for kind in glimpse.KINDS}}.items():
            chosen = [hit for hit, item in zip(hits, questions, strict=True) if item.kind in kinds]
            row[group] = sum(chosen) / len(chosen)
        row["seconds"] = round(time.perf_counter() - begun, 1)
        rows.append(row)
    return rows


def overview(rows: list[dict[str, Any]], count: int) -> str:
    """Exact match over all kinds as Markdown: a line a method, a column a keep."""
    lines = [
        f"Exact match in % of glimpse on {count} held-out questions (untouched: {100 * rows[0]['all']:.1f}).",
        "",
        "| method | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |",
        "|---|" + "--:|" * len(KEEPS),
    ]
    for label in METHODS:
        cells = [f"{100 * row['all']:.1f}" for row in rows if row["method"] == label]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]], count: int) -> str:
    """The rows as Markdown, by group of questions."""
    lines = [
        f"Exact match in % of glimpse on {count} questions of held-out set {glimpse.HELDOUT_VERSION}.",
        "",
        "| method | keep | all | " + " | ".join(GROUPS) + " |",
        "|---|--:|--:|" + "--:|" * len(GROUPS),
    ]
    for row in rows:
        whole = f"{100 * row['all']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
        parts = " | ".join(f"{100 * row[group]:.1f}" for group in GROUPS)
        lines.append(f"| {row['method']} | {row['keep']} | {whole} | {parts} |")
    return "\n".join([*lines, "", NOTES])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1008, help="how many held-out questions")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    options = parser.parse_args()
    rows = measure(options.count, options.batch_size)
    text = overview(rows, options.count) + "\n\n" + table(rows, options.count)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "accuracy.md").write_text(text)
    about = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "questions": options.count,
        "heldout_version": glimpse.HELDOUT_VERSION,
        "foveate": foveate.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    (options.out / "accuracy.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    with (options.out / "accuracy.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
