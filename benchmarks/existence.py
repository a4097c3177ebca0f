"""Does contrast keep a model from seeing what is not there? glimpse's yes/no answers to "Is there a ...?".

python benchmarks/existence.py

About half of the things asked about are in the picture. Writes existence.md and existence.json. Runs offline, on two
CPU cores in about five minutes.
"""

import argparse
import json
import platform
import sys
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from rich.progress import track

import foveate
from foveate import glimpse
from foveate.evaluation import exact_match, generate, interval, prepare
from foveate.glimpse.world import question

KIND = "exists"
METHODS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "untouched": (None, {}),
    "MINT": ("mint", {}),
    "MINT, away from the reduced view": ("mint", {"amplify": "full"}),
    "MINT keep=0.1": ("mint", {"keep": 0.1}),
    "MINT keep=0.1, away from the reduced view": ("mint", {"keep": 0.1, "amplify": "full"}),
    "the reduced view alone, keep=0.1": ("fastv", {"keep": 0.1, "layer": 2}),
}
PICTURES = ("as drawn", "blurred", "noisy")
NOTES = """\
- as drawn: the held-out pictures. blurred: shrunk to a fifth of their side and enlarged again. noisy: every pixel plus
  normal noise of standard deviation 90, of 255. glimpse was trained on neither.
- accuracy: share of right answers in %, and its 95 % bootstrap interval over questions. yes: share of answers "yes";
  about half of the right answers are. false yes: share of "yes" where the thing is not there, the hallucinations.
- changed: answers that differ from those of the untouched model on the same pictures.
- away from the reduced view: amplify="full", the direction of most contrastive methods. The reduced view alone is
  FastV with MINT's layer.
"""


def pictures(kind: str, images: list[Image.Image]) -> list[Image.Image]:
    """The pictures, spoilt or not; the same every time."""
    if kind == "blurred":
        return [image.resize((image.width // 5,) * 2, Image.Resampling.BILINEAR).resize(image.size) for image in images]
    if kind == "noisy":
        rng = np.random.default_rng(0)
        noisy = [np.asarray(image, np.float32) + rng.normal(0, 90, (*image.size, 3)) for image in images]
        return [Image.fromarray(pixels.clip(0, 255).astype(np.uint8)) for pixels in noisy]
    return images


def measure(count: int, batch_size: int) -> list[dict[str, Any]]:
    """One row for each kind of picture and method."""
    torch.set_num_threads(1)  # more of them wait for each other longer than they compute
    model, processor = glimpse.load()
    kinds, first = len(glimpse.KINDS), glimpse.KINDS.index(KIND)
    # Those of `glimpse.heldout` that ask for existence.
    seeds = range(
        glimpse.HELDOUT_VERSION * 1_000_000 + first, glimpse.HELDOUT_VERSION * 1_000_000 + kinds * count, kinds
    )
    questions = [question(seed, KIND) for seed in seeds]
    rows = []
    for kind in PICTURES:
        images = pictures(kind, [item.image for item in questions])
        batches = prepare(processor, images, [item.question for item in questions], batch_size)
        untouched: list[str] = []
        for label, (name, options) in track(METHODS.items(), description=kind):
            with nullcontext() if name is None else foveate.prune(model, name, **options):
                said = generate(model, processor, batches, max_new_tokens=8)
            untouched = untouched or said
            hits = [exact_match(text, item.answer) for text, item in zip(said, questions, strict=True)]
            absent = [text for text, item in zip(said, questions, strict=True) if item.answer == "no"]
            low, high = interval(hits)
            rows.append(
                {
                    "pictures": kind,
                    "method": label,
                    "accuracy": sum(hits) / count,
                    "low": low,
                    "high": high,
                    "yes": sum(exact_match(text, "yes") for text in said) / count,
                    "false yes": sum(exact_match(text, "yes") for text in absent) / len(absent),
                    "neither": sum(not exact_match(text, "yes") and not exact_match(text, "no") for text in said)
                    / count,
                    "changed": sum(a != b for a, b in zip(said, untouched, strict=True)),
                }
            )
    return rows


def table(rows: list[dict[str, Any]], count: int) -> str:
    """The rows as Markdown."""
    lines = [
        f"{count} yes/no questions of held-out set {glimpse.HELDOUT_VERSION} to glimpse.",
        "",
        "| pictures | method | accuracy | yes | false yes | changed |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        accuracy = f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
        parts = f"{100 * row['yes']:.1f} | {100 * row['false yes']:.1f} | {row['changed']}"
        lines.append(f"| {row['pictures']} | {row['method']} | {accuracy} | {parts} |")
    return "\n".join([*lines, "", NOTES])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400, help="how many held-out questions")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    options = parser.parse_args()
    rows = measure(options.count, options.batch_size)
    text = table(rows, options.count)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "existence.md").write_text(text)
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
    (options.out / "existence.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
