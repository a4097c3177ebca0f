"""Is it enough that a part of each frame goes through every second layer? Clips, by arms of VideoLLM-MoD.

python benchmarks/frames.py
python benchmarks/frames.py --runs training/runs

The shipped model was not trained to have tokens skip layers. In the folder of runs are what training/videollm_mod.py
wrote: routers for the shipped model in `videollm_mod`, models that were trained with --joint in `videollm_mod-` and
their --router. `time`: the mean over kinds of questions that one frame cannot answer. `token_layers`: through how many
of the layers an image token goes, as a share of all.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor

import foveate
from foveate import glimpse
from foveate.asking.loading import hush
from foveate.evaluation import exact_match, generate, interval, score
from foveate.evaluation.accuracy import CLIP_GROUPS
from foveate.evaluation.questions import as_items
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.runner import Batches
from foveate.evaluation.speed import token_layers
from foveate.evaluation.tables import markdown
from foveate.methods.base import Method

UNTRAINED = ("none", "random", "uniform", "exit", "exit:same work")
TRAINED = ("none", "learned", "random", "uniform", "exit")


def arm(router: str, keep: float, weights: Path | None) -> Method | None:
    """What an arm prunes with; None for nothing."""
    if router == "none":
        return None
    if router.startswith("exit"):  # what is not drawn leaves for good, behind the first layer of six
        return foveate.RandomLayer(keep=keep if router == "exit" else (2 + 3 * keep) / 5, layer=1)
    return foveate.VideoLLMMoD(keep=keep, router=router, weights=weights if router == "learned" else None)


def measure(results: Results, options: argparse.Namespace) -> None:
    """Adds the rows that are missing."""
    hush()
    torch.set_num_threads(1)
    questions = glimpse.heldout_clips(options.count)
    arms: list[tuple[str, str, Path, Path | None]] = [("nothing", each, glimpse.VIDEO_PATH, None) for each in UNTRAINED]
    if options.runs is not None:
        routers = options.runs / "videollm_mod"
        arms += [("routers", "learned", glimpse.VIDEO_PATH, routers)]
        folders = {each: options.runs / f"videollm_mod-{each}" / "model" for each in TRAINED}
        arms += [("all", each, folder, folder) for each, folder in folders.items()]
    there = [each for each in arms if (each[3] or each[2]).exists()]
    for label, router, folder, weights in track(there, description="arms"):
        if results.find(trained=label, router=router):
            continue
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        batches = Batches(AutoProcessor.from_pretrained(folder), as_items(questions), options.batch_size)
        method = arm(router, options.keep, weights)
        with nullcontext() if method is None else foveate.prune(model, method, record=True) as pruned:
            said = generate(model, batches.processor, batches)
        row: dict[str, Any] = {"trained": label, "router": router}
        hits = [exact_match(text, question.answer) for text, question in zip(said, questions, strict=True)]
        low, high = interval(hits)
        kinds = score(said, questions)
        row |= {"accuracy": kinds.pop("all"), "accuracy_low": low, "accuracy_high": high}
        row |= {
            f"accuracy:{group}": mean(kinds[kind] for kind in of if kind in kinds) for group, of in CLIP_GROUPS.items()
        }
        report = None if method is None else pruned.report
        row["token_layers"] = 1.0 if report is None else token_layers(report, [method.place])
        row["kv_share"] = 1.0 if report is None else report.kv_bytes / report.kv_bytes_unpruned
        results.add(row | {f"accuracy:{kind}": share for kind, share in kinds.items()})


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder of trained models")
    parser.add_argument("--count", type=int, default=440, help="how many held-out questions, all kinds in turn")
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, help="the folder of results")
    options = parser.parse_args()
    settings = {"data": f"glimpse clips {glimpse.CLIPS_VERSION}", "count": options.count, "keep": options.keep}
    settings |= {"batch_size": options.batch_size, "device": "cpu", "dtype": "float32", "threads": 1}
    with Results(options.out, "frames", settings, keys=("trained", "router")) as results:
        measure(results, options)
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
