"""Does QueCC use the question? glimpse's answers with the question's text, without it, and with another question's.

    python benchmarks/quecc.py --unasked 'training/runs/quecc-none-{keep}'

`own` is the compressor that comes with the library, `another` the same one shown the text of a question of another
kind, `none` one that was trained as long without any (`training/quecc.py --question none`), `pooling` the mean of each
cell. Rows with a minus are differences on the same questions. Several turns are left out: batches of one have no other
question. Intervals: 95 %, bootstrap over questions. `answers.csv` holds what was said.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from answers import Answers
from rich.progress import track
from torch import Tensor

import foveate
from foveate import glimpse
from foveate.evaluation import generate
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.runner import Batch, model_inputs
from foveate.evaluation.tables import markdown
from foveate.methods.quecc import QueCC
from foveate.methods.tokens import EncoderTokens

KEEPS = (16, 9, 4, 1)
KINDS = tuple(kind for kind in glimpse.KINDS if kind != "again")
BATCH = 5 * len(KINDS)
DIFFERENCES = (("own", "none"), ("own", "another"), ("none", "another"), ("own", "pooling"))


class Another(QueCC):
    """Shows each picture the text of a question half a batch away, which is of another kind."""

    def merge(self, tokens: EncoderTokens, keep: Tensor) -> Tensor | None:
        assert tokens.question is not None
        return super().merge(replace(tokens, question=tokens.question.roll(tokens.tiles // 2, 0)), keep)


def arms(keep: int, own: str | None, unasked: str) -> dict[str, Callable[[Any], AbstractContextManager[Any]]]:
    """How to run each arm that there are weights for."""
    weights = None if own is None else own.format(keep=keep)
    blind = Path(unasked.format(keep=keep))
    found: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
        "own": lambda model: foveate.prune(model, QueCC(keep=keep, weights=weights)),
        "another": lambda model: foveate.prune(model, Another(keep=keep, weights=weights)),
        "pooling": lambda model: foveate.prune(model, "pooling", keep=keep),
    }
    if blind.exists():
        found["none"] = lambda model: foveate.prune(model, QueCC(keep=keep, weights=blind, question="none"))
    return found


def measure(results: Results, keeps: list[int], own: str | None, unasked: str, count: int) -> None:
    """Adds the rows that are missing."""
    torch.set_num_threads(1)  # more of them wait for each other longer than they compute
    model, processor = glimpse.load()
    questions = glimpse.heldout(count, kinds=KINDS)
    groups = [list(range(start, min(start + BATCH, count))) for start in range(0, count, BATCH)]
    batches = [
        Batch(
            group, model_inputs(processor, [questions[i].images for i in group], [questions[i].question for i in group])
        )
        for group in groups
    ]
    answers = Answers(results.folder, questions, ("arm", "keep"))

    def answer(arm: str, keep: int | None, run: Callable[[Any], AbstractContextManager[Any]]) -> None:
        if not results.find(arm=arm, keep=keep):
            with run(model):
                said = generate(model, processor, batches)
            results.add({"arm": arm, "keep": keep, **answers.means(answers.add(said, arm=arm, keep=keep))})

    answer("untouched", None, nullcontext)
    for keep in keeps:
        for arm, run in track(arms(keep, own, unasked).items(), description=f"{keep} tokens"):
            answer(arm, keep, run)
        for one, other in DIFFERENCES:
            first, second = (answers.right(arm=arm, keep=keep) for arm in (one, other))
            if len(first) == len(second) > 0 and not results.find(arm=f"{one} - {other}", keep=keep):
                results.add({"arm": f"{one} - {other}", "keep": keep, **answers.means(first - second)})


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=35 * len(KINDS), help="how many held-out questions")
    parser.add_argument("--keep", default=",".join(map(str, KEEPS)), help="tokens per image")
    parser.add_argument("--own", help="folders of other weights than the shipped ones; {keep} stands for the tokens")
    parser.add_argument("--unasked", default="training/runs/quecc-none-{keep}", help="those of the arm without text")
    parser.add_argument("--out", type=Path, help="the folder of results")
    options = parser.parse_args()
    settings = {"data": f"glimpse {glimpse.HELDOUT_VERSION}", "count": options.count, "batch_size": BATCH}
    settings |= {"device": "cpu", "dtype": "float32", "threads": 1}
    with Results(options.out, "quecc", settings, keys=("arm", "keep")) as results:
        measure(results, [int(keep) for keep in options.keep.split(",")], options.own, options.unasked, options.count)
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
