"""Is it the one-hot grouping that makes VisToG? Its arms on glimpse, beside what is not trained, at as many tokens.

python benchmarks/vistog.py --weights training/runs/vistog-16 training/runs/vistog-16-soft

The arms: `vistog` as shipped (each patch in one group); what training/vistog.py wrote into the folders of `--weights`,
such as one with `--grouping soft` (each semantic token attends to all patches, as in a Q-Former), in rows named after
the folders; `pooling` (the mean of each cell of a fixed grid) and `k-means` (groups of like patches, found anew in
every picture), which need no training; and methods that keep patches as they are. Goes on where it stopped.
"""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForImageTextToText

import foveate
from foveate import glimpse
from foveate.evaluation import exact_match, generate, interval, score
from foveate.evaluation.cost import prefill_flops
from foveate.evaluation.questions import from_glimpse
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.runner import Batches
from foveate.evaluation.tables import markdown
from foveate.methods.base import EncoderMethod, Method
from foveate.methods.pooling import cells
from foveate.methods.tokens import EncoderTokens
from foveate.methods.trained import WEIGHTS_NAME, Plugin, shipped
from foveate.methods.vistog import centroids, mean_of_members, members

MAX_NEW_TOKENS = 64


@dataclass
class KMeans(EncoderMethod):
    """Group the patches by their states, and let the mean of each group stand at the patch nearest to it.

    Lloyd's algorithm, from the patches amid the cells of an even split; the means go through the projector.
    """

    summary: ClassVar[str] = "the means of groups of like patches"
    source: ClassVar[str] = "a baseline"
    name: ClassVar[str] = "k-means"
    reads = frozenset({"states", "features"})
    keep: float | int = 16
    rounds: int = 10

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        nearness, _ = self._groups(tokens, budget)
        none = torch.zeros(nearness.shape[0], nearness.shape[2], dtype=torch.bool, device=tokens.device)
        return none.scatter(1, centroids(nearness), True)

    def merge(self, tokens: EncoderTokens, keep: Tensor) -> Tensor | None:
        nearness, means = self._groups(tokens, keep.sum(-1))
        assert tokens.features is not None
        at = centroids(nearness).unsqueeze(-1).expand(-1, -1, tokens.features.shape[-1])
        return torch.zeros_like(tokens.features).scatter(1, at, tokens.project(means.to(tokens.features.dtype)))

    def _groups(self, tokens: EncoderTokens, budget: Tensor) -> tuple[Tensor, Tensor]:
        """How near each patch is to each group's mean, (tiles, m, n), and the means, (tiles, m, width)."""
        assert tokens.states is not None
        states = tokens.states.float()
        *_, amid = cells(budget, tokens.grid)
        means = states[amid.flatten(1)].view(len(states), -1, states.shape[-1])
        for _ in range(self.rounds):
            joins = members(-torch.cdist(means, states)).float()
            empty = joins.sum(-1, keepdim=True) == 0
            means = means.where(empty, mean_of_members(joins, states, eps=1e-6))
        return -torch.cdist(means, states), means


@dataclass(frozen=True)
class Arm:
    """A row.

    method: None for the untouched model. trained: numbers that training changed. model: a folder; None for glimpse.
    """

    name: str
    method: Method | None
    trained: int = 0
    model: Path | None = None


def learned(folder: Path | None) -> Iterator[Arm]:
    """The weights that come with the library, or those of a folder."""
    inner = None if folder is None else folder / "model"  # where the LLM was trained along
    joint = inner is not None and inner.is_dir()
    place = inner if joint else folder
    for plugin in shipped("vistog") if place is None else [Plugin.read(place / WEIGHTS_NAME)]:
        options = {"weights": place, **plugin.options}
        soft = options["grouping"] == "soft"
        name = folder.name if folder is not None else "vistog" + ":grouping=soft" * soft
        numbers = sum(tensor.numel() for tensor in plugin.tensors(torch.device("cpu")).values())
        if joint:
            numbers += glimpse.load()[0].model.language_model.num_parameters()
        yield Arm(name, foveate.get_method("vistog", **options), numbers, place if joint else None)


def arms(folders: list[Path]) -> Iterator[Arm]:
    """All rows."""
    trained = [arm for folder in (*folders, None) for arm in learned(folder)]
    yield Arm("untouched", None)
    for keep in sorted({arm.method.keep for arm in trained if arm.method is not None}):
        for name in ("random", "visionzip", "divprune", "pooling"):
            yield Arm(name, foveate.get_method(name, keep=keep))
        yield Arm("k-means", KMeans(keep))
    yield from trained


def measure(results: Results, arms: list[Arm], count: int, batch_size: int) -> None:
    """Adds the rows that are missing."""
    torch.set_num_threads(1)  # more of them wait for each other longer than they compute
    model, processor = glimpse.load()
    questions = glimpse.heldout(count)
    batches = Batches(processor, from_glimpse(count), batch_size)
    whole = prefill_flops(model, batches.middle.inputs)
    for arm in track(arms, description="arms"):
        keep = None if arm.method is None else arm.method.keep
        if results.find(method=arm.name, keep=keep):
            continue
        own = model
        if arm.model is not None:
            own = AutoModelForImageTextToText.from_pretrained(arm.model, dtype=torch.float32)
        with contextlib.nullcontext() if arm.method is None else foveate.prune(own, arm.method):
            said = generate(own, processor, batches, MAX_NEW_TOKENS)
            share = prefill_flops(own, batches.middle.inputs) / whole
        low, high = interval([exact_match(text, q.answer) for text, q in zip(said, questions, strict=True)])
        kinds = score(said, questions)
        row = {"method": arm.name, "keep": keep, "trained": arm.trained, "prefill_share": share}
        row |= {"accuracy": kinds.pop("all"), "accuracy_low": low, "accuracy_high": high}
        results.add(row | {f"accuracy:{kind}": right for kind, right in kinds.items()})


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=512, help="how many held-out questions")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, help="the folder of results")
    parser.add_argument("--weights", type=Path, nargs="*", default=[], help="folders that training/vistog.py wrote")
    options = parser.parse_args()
    settings = {"model": "glimpse", "data": f"glimpse {glimpse.HELDOUT_VERSION}", "count": options.count}
    settings |= {"dtype": "float32", "batch_size": options.batch_size}
    with Results(options.out, "vistog", settings, keys=("method", "keep")) as results:
        measure(results, list(arms(options.weights)), options.count, options.batch_size)
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
