"""Does contrast keep a model from seeing what is not there? glimpse's yes/no answers to "Is there a ...?".

python benchmarks/existence.py

About half of the things asked about are in the picture; `false_yes_share` counts "yes" where they are not. `changed`:
answers that are not the untouched model's on the same pictures. Runs offline, on two CPU cores in about five minutes.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track

import foveate
from foveate import glimpse
from foveate.evaluation import exact_match, generate, interval, prepare
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.tables import markdown

METHODS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "untouched": (None, {}),
    "mint": ("mint", {}),
    "mint:amplify=full": ("mint", {"amplify": "full"}),  # the direction of most contrastive methods
    "mint:keep=0.1": ("mint", {"keep": 0.1}),
    "mint:amplify=full,keep=0.1": ("mint", {"amplify": "full", "keep": 0.1}),
    "fastv:keep=0.1,layer=2": ("fastv", {"keep": 0.1, "layer": 2}),  # the reduced view alone, behind the same layer
}
PICTURES = ("as drawn", "blurred", "noisy")


def pictures(kind: str, images: list[Image.Image]) -> list[Image.Image]:
    """The pictures, spoilt or not; the same every time."""
    if kind == "blurred":
        return [image.resize((image.width // 5,) * 2, Image.Resampling.BILINEAR).resize(image.size) for image in images]
    if kind == "noisy":
        rng = np.random.default_rng(0)
        noisy = [np.asarray(image, np.float32) + rng.normal(0, 90, (*image.size, 3)) for image in images]
        return [Image.fromarray(pixels.clip(0, 255).astype(np.uint8)) for pixels in noisy]
    return images


def measure(results: Results, count: int, batch_size: int) -> None:
    """Adds the rows that are missing."""
    torch.set_num_threads(1)  # more of them wait for each other longer than they compute
    model, processor = glimpse.load()
    questions = glimpse.heldout(count, kinds=("exists",))
    for kind in PICTURES:
        if all(results.find(pictures=kind, method=label) for label in METHODS):
            continue
        images = pictures(kind, [item.image for item in questions])
        batches = prepare(processor, images, [item.question for item in questions], batch_size)
        untouched: list[str] = []
        for label, (name, options) in track(METHODS.items(), description=kind):
            with nullcontext() if name is None else foveate.prune(model, name, **options):
                said = generate(model, processor, batches, max_new_tokens=8)
            untouched = untouched or said
            if results.find(pictures=kind, method=label):
                continue
            hits = [exact_match(text, item.answer) for text, item in zip(said, questions, strict=True)]
            yes = [exact_match(text, "yes") for text in said]
            no = [exact_match(text, "no") for text in said]
            absent = [sees for sees, item in zip(yes, questions, strict=True) if item.answer == "no"]
            low, high = interval(hits)
            row = {"pictures": kind, "method": label, "accuracy": sum(hits) / count}
            row |= {"accuracy_low": low, "accuracy_high": high, "yes_share": sum(yes) / count}
            row |= {"false_yes_share": sum(absent) / len(absent), "neither_share": (count - sum(yes) - sum(no)) / count}
            results.add(row | {"changed": sum(a != b for a, b in zip(said, untouched, strict=True))})


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="how many held-out questions")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--out", type=Path, help="the folder of results")
    options = parser.parse_args()
    settings = {"data": f"glimpse {glimpse.HELDOUT_VERSION}", "count": options.count, "batch_size": options.batch_size}
    settings |= {"device": "cpu", "dtype": "float32", "threads": 1, "seed": 0}
    with Results(options.out, "existence", settings, keys=("pictures", "method")) as results:
        measure(results, options.count, options.batch_size)
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
