"""Are glimpse's visual heads the heads that need the picture? SparseMM with their scores and with others.

python benchmarks/sparsemm.py

Beside the measured scores: equal ones, random ones, and the measured ones dealt out to other KV heads, which are as
uneven. The questions are those of glimpse from number 860,000 on, with answers of more than one word, since evictions
behind the prefill hardly change others. Runs offline, on two CPU cores in about five minutes.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import foveate
from foveate import glimpse
from foveate.asking.variant import Variant
from foveate.evaluation.accuracy import GROUPS, measure
from foveate.evaluation.questions import from_glimpse
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.runner import Batches
from foveate.evaluation.tables import markdown
from foveate.methods.trained import shipped

FIRST = 860_000
KEEPS = (0.25,)
SEEDS = (0, 1, 2)
SHARING = 3  # query heads of a KV head


def dealt(scores: Tensor, seed: int) -> Tensor:
    """The scores of whole KV heads in another order."""
    groups = scores.reshape(-1, SHARING)
    return groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))].view_as(scores)


def variants(keep: float) -> list[Variant]:
    """What is compared at one budget."""
    scores = shipped("sparsemm")[0].tensors(torch.device("cpu"))["heads"]
    own = foveate.SparseMM(keep=keep)
    methods = {
        "visual": own,
        "visual, floor=0.5": foveate.SparseMM(keep=keep, floor=0.5),
        "equal": own.holding({"heads": torch.ones_like(scores)}),
        **{f"random, seed={seed}": foveate.SparseMM(keep=keep, heads="random", seed=seed) for seed in SEEDS},
        **{f"dealt, seed={seed}": own.holding({"heads": dealt(scores, seed)}) for seed in SEEDS},
    }
    return [Variant(name, keep, method) for name, method in methods.items()]


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="how many questions")
    parser.add_argument("--batch-size", type=int, default=30)
    parser.add_argument("--out", type=Path, help="the folder of results")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more of them wait for each other longer than they compute
    model, processor = glimpse.load()
    batches = Batches(processor, from_glimpse(options.count, GROUPS["more_words"], FIRST), options.batch_size)
    settings = {"data": f"glimpse {glimpse.HELDOUT_VERSION}", "first": FIRST, "count": options.count}
    settings |= {"device": "cpu", "dtype": "float32", "batch_size": options.batch_size}
    every = [variant for keep in KEEPS for variant in variants(keep)]
    with Results(options.out, "sparsemm", settings, keys=("method", "keep")) as results:
        measure(model, processor, batches, every, results, groups={}, console=Console(stderr=True))
    print(markdown([results.folder], "method,accuracy", across="keep"))


if __name__ == "__main__":
    run_script(main)
