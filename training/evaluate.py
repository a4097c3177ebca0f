"""Scores glimpse on its held-out questions, beside what another picture and the most frequent answers score.

python training/evaluate.py
python training/evaluate.py --model src/foveate/glimpse/video   # with the frames in another order, and one frame alone

The folder of results also gets `errors.csv`, the model's wrong answers.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from foveate.evaluation import blind, exact_match, generate, interval, majority, score
from foveate.evaluation.questions import as_items
from foveate.evaluation.results import Results, run_script, write_csv
from foveate.evaluation.runner import Batches
from foveate.evaluation.tables import markdown
from foveate.glimpse import CLIPS_VERSION, HELDOUT_VERSION, KINDS, ONE_PICTURE, PATH, heldout, heldout_clips
from foveate.glimpse.clips import TOKENS
from foveate.glimpse.happenings import backwards, frozen, shuffled


def evaluate(results: Results, model: Any, processor: Any, count: int, batch_size: int) -> None:
    """Adds the rows that are missing: the model, and what is right without its looking or knowing."""
    of_clips = sees_clips(model)
    kinds_known = KINDS if model.config.model_type == "llava" else ONE_PICTURE
    questions = heldout_clips(count) if of_clips else heldout(count, kinds=kinds_known)
    others = [replace(question, images=images) for question, images in zip(questions, blind(questions), strict=True)]
    shown = {"the model": questions}
    if of_clips:
        shown |= {"frames shuffled": shuffled(questions), "frames backwards": backwards(questions)}
        shown |= {"one frame in place of all": frozen(questions)}
    shown["shown another clip" if of_clips else "shown another picture"] = others
    for label in (*shown, "most frequent answer"):
        if results.find(answers=label):
            continue
        begun = time.perf_counter()
        if label in shown:
            said = generate(model, processor, Batches(processor, as_items(shown[label]), batch_size))
        else:
            said = majority(questions)
        seconds = round(time.perf_counter() - begun, 1)
        right = [exact_match(a, question.answer) for a, question in zip(said, questions, strict=True)]
        if label == "the model":
            errors = [
                {"kind": q.kind, "question": q.question, "answer": q.answer, "said": a}
                for q, a, hit in zip(questions, said, right, strict=True)
                if not hit
            ]
            write_csv(results.folder / "errors.csv", errors)
        low, high = interval(right)
        kinds = score(said, questions)
        row = {"answers": label, "accuracy": kinds.pop("all"), "accuracy_low": low, "accuracy_high": high}
        row |= {f"accuracy:{kind}": share for kind, share in kinds.items()}
        results.add(row | {"seconds": seconds})


def sees_clips(model: Any) -> bool:
    """Whether a picture is a frame to it."""
    return getattr(model.config, "image_seq_length", None) == TOKENS


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of another model than the shipped one")
    parser.add_argument("--count", type=int, default=2000, help="how many held-out questions")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, help="the folder of results")
    options = parser.parse_args()
    folder = options.model or PATH
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    own = (folder / "tokenizer.json").exists()  # the small model shares the processor of the other
    processor = AutoProcessor.from_pretrained(folder if own else PATH)
    settings = {"model": str(options.model or "glimpse"), "parameters": model.num_parameters()}
    settings |= {"dtype": "float32", "device": "cpu"}
    settings |= {"threads": torch.get_num_threads(), "batch_size": options.batch_size}
    data = f"glimpse clips {CLIPS_VERSION}" if sees_clips(model) else f"glimpse {HELDOUT_VERSION}"
    settings |= {"data": data, "count": options.count}
    with Results(options.out, "glimpse", settings, keys=("answers",)) as results:
        evaluate(results, model, processor, options.count, options.batch_size)
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
