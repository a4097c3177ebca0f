"""What a small model's guidance is worth: glimpse guided by the small glimpse (SGL), and early exits.

python benchmarks/guided.py

Writes guided.md and guided.json. Runs offline, on two CPU cores in about five minutes.
"""

import argparse
import json
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track

import foveate
from foveate import glimpse
from foveate.evaluation import exact_match, generate, interval, prepare

KEEPS = (0.5, 0.25, 0.1)
THRESHOLDS = (0.99, 0.9, 0.7, 0.5)
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "FastV, layer 1": ("fastv", {"layer": 1}),
    "FastV, layer 2": ("fastv", {"layer": 2}),
    "random": ("random", {}),
    "uniform": ("uniform", {}),
}
MAX_NEW_TOKENS = 40
NOTES = """\
- SGL drops in front of layer 1 of 6, its default share of the depth; random and uniform drop before the language model.
- exits: share of questions whose score reaches the threshold, so that the small glimpse's answer is taken and glimpse
  is not run, one question at a time. right at exit: exact match of those answers; all: of all answers.
- The small glimpse has 1.3 of glimpse's 4.8 million parameters and is nearly as often right on this world, more often
  than glimpse with half of its tokens. So exits look better here than where a guide knows less than its model; SGL's
  choice of tokens compares with the other rows of the same keep.
"""


def guided(model: Any, small: Any, processor: Any, batches: Any, keep: float) -> list[tuple[str, str, float]]:
    """For each question glimpse's answer with guidance, the guide's own, and how far that can be trusted."""
    found: dict[int, tuple[str, str, float]] = {}
    with foveate.prune(model, foveate.SGL(guide=small, keep=keep, exit_threshold=1.0)) as pruned:
        for batch in batches:
            prompt = batch.inputs["input_ids"].shape[1]
            tokens = model.generate(**batch.inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
            if pruned.guided.exited:
                raise SystemExit("a whole batch reached a score of 1.0: use larger batches")
            said, guess = (
                [text.strip() for text in processor.batch_decode(answer[:, prompt:], skip_special_tokens=True)]
                for answer in (tokens, pruned.guided.sequences)
            )
            found.update(zip(batch.indices, zip(said, guess, pruned.guided.scores.tolist(), strict=True), strict=True))
    return [found[index] for index in sorted(found)]


def measure(count: int, batch_size: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows without exits (method, keep), and rows with them (keep, threshold)."""
    torch.set_num_threads(1)  # more of them wait for each other longer than they compute
    model, processor = glimpse.load()
    small, _ = glimpse.load("small")
    questions = glimpse.heldout(count)
    batches = prepare(processor, [item.image for item in questions], [item.question for item in questions], batch_size)
    plain: list[dict[str, Any]] = []
    exits: list[dict[str, Any]] = []

    def right(said: list[str]) -> list[bool]:
        return [exact_match(text, item.answer) for text, item in zip(said, questions, strict=True)]

    def note(method: str, keep: float, hits: list[bool]) -> None:
        low, high = interval(hits)
        plain.append({"method": method, "keep": keep, "all": sum(hits) / count, "low": low, "high": high})

    note("glimpse", 1.0, right(generate(model, processor, batches, MAX_NEW_TOKENS)))
    note("small glimpse", 1.0, right(generate(small, processor, batches, MAX_NEW_TOKENS)))
    for keep in track(KEEPS, description="keep"):
        answers = guided(model, small, processor, batches, keep)
        large, guess = (right([answer[i] for answer in answers]) for i in (0, 1))
        note("SGL", keep, large)
        for threshold in THRESHOLDS:
            trusted = [score >= threshold for *_, score in answers]
            taken = [g if t else m for g, m, t in zip(guess, large, trusted, strict=True)]
            hits = [g for g, t in zip(guess, trusted, strict=True) if t]
            share, sure = sum(trusted) / count, sum(hits) / len(hits) if hits else None
            exits.append(
                {"keep": keep, "threshold": threshold, "exits": share, "right at exit": sure, "all": sum(taken) / count}
            )
        for label, (name, options) in OTHERS.items():
            with foveate.prune(model, name, keep=keep, **options):
                note(label, keep, right(generate(model, processor, batches, MAX_NEW_TOKENS)))
    return plain, exits


def table(plain: list[dict[str, Any]], exits: list[dict[str, Any]], count: int) -> str:
    """The rows as Markdown."""
    lines = [
        f"Exact match in % on {count} questions of held-out set {glimpse.HELDOUT_VERSION} (95 % bootstrap interval).",
        "",
        "| method | keep | all |",
        "|---|--:|--:|",
    ]
    for row in plain:
        whole = f"{100 * row['all']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
        lines.append(f"| {row['method']} | {row['keep']} | {whole} |")
    lines += [
        "",
        "SGL with early exit:",
        "",
        "| keep | threshold | exits | right at exit | all |",
        "|--:|--:|--:|--:|--:|",
    ]
    for row in exits:
        sure = "" if row["right at exit"] is None else f"{100 * row['right at exit']:.1f}"
        lines.append(
            f"| {row['keep']} | {row['threshold']} | {100 * row['exits']:.1f} | {sure} | {100 * row['all']:.1f} |"
        )
    return "\n".join([*lines, "", NOTES])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=504, help="how many held-out questions")
    parser.add_argument("--batch-size", type=int, default=42)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    options = parser.parse_args()
    plain, exits = measure(options.count, options.batch_size)
    text = table(plain, exits, options.count)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "guided.md").write_text(text)
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
    (options.out / "guided.json").write_text(json.dumps({**about, "rows": plain, "exits": exits}, indent=1) + "\n")


if __name__ == "__main__":
    main()
