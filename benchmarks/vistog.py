"""Is it the one-hot grouping that makes VisToG? Its arms on glimpse, beside what is not trained, at as many tokens.

python benchmarks/vistog.py

The arms: `vistog` as shipped (each patch in one group), `vistog:grouping=soft` (each semantic token attends to all
patches, as in a Q-Former), both trained alike by training/vistog.py; `pooling` (the mean of each cell of a fixed grid)
and `k-means` (groups of like patches, drawn anew for every picture), which need no training; and methods that keep
patches as they are. `--joint FOLDER` adds a model whose LLM was trained along. Goes on where it stopped.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForImageTextToText

import foveate
from foveate import glimpse
from foveate.evaluation import exact_match, generate, interval, score
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


def arms() -> Iterator[tuple[str, Method, str]]:
    """Name, method, and what was trained of it."""
    for plugin in sorted(shipped("vistog"), key=lambda plugin: (plugin.options["keep"], plugin.options["grouping"])):
        options = plugin.options
        numbers = sum(tensor.numel() for tensor in plugin.tensors(torch.device("cpu")).values())
        name = "vistog" if options["grouping"] == "hard" else f"vistog:grouping={options['grouping']}"
        yield name, foveate.get_method("vistog", **options), f"{numbers:,} numbers"
    for keep in sorted({plugin.options["keep"] for plugin in shipped("vistog")}):
        yield "k-means", KMeans(keep=keep), "nothing"
        for name in ("pooling", "visionzip", "divprune", "random"):
            yield name, foveate.get_method(name, keep=keep), "nothing"


def measure(results: Results, count: int, batch_size: int, joint: Path | None) -> None:
    """Adds the rows that are missing."""
    torch.set_num_threads(1)  # more of them wait for each other longer than they compute
    model, processor = glimpse.load()
    questions, items = glimpse.heldout(count), from_glimpse(count)
    batches = Batches(processor, items, batch_size)

    def note(name: str, method: Method | None, trained: str, model: Any = model) -> None:
        keep: Any = None if method is None else method.keep
        if results.find(method=name, keep=keep):
            return
        if method is None:
            said = generate(model, processor, batches, MAX_NEW_TOKENS)
        else:
            with foveate.prune(model, method):
                said = generate(model, processor, batches, MAX_NEW_TOKENS)
        hits = [exact_match(text, question.answer) for text, question in zip(said, questions, strict=True)]
        low, high = interval(hits)
        kinds = score(said, questions)
        row = {"method": name, "keep": keep, "trained": trained, "accuracy": kinds.pop("all")}
        row |= {"accuracy_low": low, "accuracy_high": high}
        results.add(row | {f"accuracy:{kind}": share for kind, share in kinds.items()})

    note("untouched", None, "nothing")
    for name, method, trained in track(list(arms()), description="arms"):
        note(name, method, trained)
    if joint is not None:
        options = Plugin.read(joint / WEIGHTS_NAME).options
        along = AutoModelForImageTextToText.from_pretrained(joint, dtype=torch.float32).eval()
        numbers = sum(weight.numel() for weight in along.model.language_model.parameters())
        note("vistog, joint", foveate.get_method("vistog", weights=joint, **options), f"{numbers:,} more", along)


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=800, help="how many held-out questions")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, help="the folder of results")
    parser.add_argument("--joint", type=Path, help="the folder `model` that training/vistog.py --joint wrote")
    options = parser.parse_args()
    settings = {"model": "glimpse", "data": f"glimpse {glimpse.HELDOUT_VERSION}", "count": options.count}
    settings |= {"dtype": "float32", "batch_size": options.batch_size}
    with Results(options.out, "vistog", settings, keys=("method", "keep")) as results:
        measure(results, options.count, options.batch_size, options.joint)
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
