"""Scores glimpse on its held-out questions, beside what the majority answer and a wrong picture score.

python training/evaluate.py --write benchmarks/results/glimpse.json
"""

import argparse
import json
import platform
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor

from foveate.evaluation import answer, blind, interval, majority, score
from foveate.evaluation.scores import exact_match
from foveate.glimpse import HELDOUT_VERSION, PATH, heldout


def evaluate(folder: Path, count: int, batch_size: int) -> dict:
    """Figures of the model in a folder, loaded by plain transformers and computed in float32."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    own = (folder / "tokenizer.json").exists()  # the small model shares the processor of the other
    processor = AutoProcessor.from_pretrained(folder if own else PATH)
    questions = heldout(count)
    asked = [question.question for question in questions]
    begun = time.perf_counter()
    said = answer(model, processor, [question.image for question in questions], asked, batch_size=batch_size)
    seconds = time.perf_counter() - begun
    guessed = answer(model, processor, blind(questions), asked, batch_size=batch_size)
    right = [exact_match(a, question.answer) for a, question in zip(said, questions, strict=True)]
    return {
        "exact_match": score(said, questions),
        "interval_95": interval(right),
        "wrong_picture": score(guessed, questions),
        "majority_answer": score(majority(questions), questions),
        "questions": count,
        "heldout_version": HELDOUT_VERSION,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(seconds, 1),
        "errors": [
            {"kind": q.kind, "question": q.question, "answer": q.answer, "said": a}
            for q, a, hit in zip(questions, said, right, strict=True)
            if not hit
        ][:50],
    }


def main() -> None:
    """Prints the table, and writes the figures where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=PATH)
    parser.add_argument("--count", type=int, default=2000, help="how many held-out questions")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--write", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    figures = evaluate(options.model, options.count, options.batch_size)

    table = Table(title=f"glimpse on {options.count} held-out questions, exact match in %")
    table.add_column("kind")
    columns = {
        "exact_match": "glimpse",
        "wrong_picture": "wrong picture",
        "majority_answer": "majority answer",
    }
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for kind in figures["exact_match"]:
        table.add_row(kind, *(f"{100 * figures[column][kind]:.1f}" for column in columns))
    Console().print(table)
    if options.write:
        figures |= {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
