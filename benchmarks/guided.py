"""What a small model's guidance is worth: glimpse guided by the small glimpse (SGL), and early exits.

python benchmarks/guided.py

`sgl:exit_threshold=0.9` is SGL where the small glimpse's answer is taken, and glimpse not run, when its score reaches
0.9, one question at a time, in one turn. Runs offline, on two CPU cores in about five minutes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import foveate
from foveate import glimpse
from foveate.evaluation import exact_match, generate, interval
from foveate.evaluation.questions import from_glimpse
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.runner import Batches
from foveate.evaluation.tables import markdown

KEEPS = (0.5, 0.25, 0.1)
THRESHOLDS = (0.99, 0.9, 0.7, 0.5)
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fastv:layer=1": ("fastv", {"layer": 1}),
    "fastv:layer=2": ("fastv", {"layer": 2}),
    "random": ("random", {}),
    "uniform": ("uniform", {}),
}
KINDS = tuple(kind for kind in glimpse.KINDS if kind != "again")  # a guide that answers alone leaves no cache behind
MAX_NEW_TOKENS = 64


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


def measure(results: Results, count: int, batch_size: int) -> None:
    """Adds the rows that are missing."""
    torch.set_num_threads(1)  # more of them wait for each other longer than they compute
    model, processor = glimpse.load()
    small, _ = glimpse.load("small")
    questions = from_glimpse(count, KINDS)
    batches = Batches(processor, questions, batch_size)

    def right(said: list[str]) -> list[bool]:
        return [exact_match(text, item.answers[0]) for text, item in zip(said, questions, strict=True)]

    def note(method: str, keep: float | None, hits: list[bool], **more: float | None) -> None:
        if results.find(method=method, keep=keep):
            return
        low, high = interval(hits)
        row = {"method": method, "keep": keep, "accuracy": sum(hits) / count}
        results.add(row | {"accuracy_low": low, "accuracy_high": high} | more)

    for label, each in (("untouched", model), ("untouched small", small)):
        if not results.find(method=label, keep=None):
            note(label, None, right(generate(each, processor, batches, MAX_NEW_TOKENS)))
    for keep in track(KEEPS, description="keep"):
        guided_rows = ["sgl", *(f"sgl:exit_threshold={threshold}" for threshold in THRESHOLDS)]
        if not all(results.find(method=label, keep=keep) for label in guided_rows):
            answers = guided(model, small, processor, batches, keep)
            large, guess = (right([answer[i] for answer in answers]) for i in (0, 1))
            note("sgl", keep, large)
            for threshold, label in zip(THRESHOLDS, guided_rows[1:], strict=True):
                trusted = [score >= threshold for *_, score in answers]
                taken = [g if t else m for g, m, t in zip(guess, large, trusted, strict=True)]
                hits = [g for g, t in zip(guess, trusted, strict=True) if t]
                sure = sum(hits) / len(hits) if hits else None
                more = {"exits_share": sum(trusted) / count, "right_at_exit_share": sure}
                note(label, keep, taken, **more)
        for label, (name, options) in OTHERS.items():
            if not results.find(method=label, keep=keep):
                with foveate.prune(model, name, keep=keep, **options):
                    note(label, keep, right(generate(model, processor, batches, MAX_NEW_TOKENS)))


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=510, help="how many held-out questions")
    parser.add_argument("--batch-size", type=int, default=42)
    parser.add_argument("--out", type=Path, help="the folder of results")
    options = parser.parse_args()
    settings = {"data": f"glimpse {glimpse.HELDOUT_VERSION}", "count": options.count, "batch_size": options.batch_size}
    settings |= {"device": "cpu", "dtype": "float32", "threads": 1, "seed": 0}
    with Results(options.out, "guided", settings, keys=("method", "keep")) as results:
        measure(results, options.count, options.batch_size)
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
