"""Schedules of rates at equal cost: searched ones beside those of PyramidDrop and FastV, and a draw, on glimpse.

python benchmarks/schedules.py

Cost is token-layers, the mean over all layers of the fraction of image tokens they see; every method gets the `keep`
that comes to the same. The found schedules are those of `foveate search` in benchmarks/results/search, drawn to that
cost: G-Search's rates all by one fraction, P-Sigmoid's curve with its steepness and its ratio of floor to `keep`. The
questions are the first of glimpse, which no search has seen. Runs offline, on an idle CPU core in a quarter of an hour.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console

import foveate
from foveate import glimpse
from foveate.asking.variant import Variant
from foveate.evaluation.accuracy import GROUPS, measure
from foveate.evaluation.questions import from_glimpse
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.runner import Batches
from foveate.evaluation.tables import markdown
from foveate.methods.base import LayerMethod
from foveate.methods.schedules import ScheduledMethod, token_layers
from foveate.methods.staged import StagedMethod

SHARES = (0.8, 0.65, 0.5)
FOUND = ("gsearch", "psigmoid")
DEPTH = 6


def cost(method: LayerMethod) -> float:
    """Mean over all layers of the fraction of image tokens they see under a method whose `keep` is a fraction."""
    if isinstance(method, ScheduledMethod):
        return token_layers(method.rates_at(DEPTH))
    stages = method.stages(DEPTH)
    staged = isinstance(method, StagedMethod)
    left = [1.0, *(method.keep ** ((i + 1) / len(stages)) if staged else method.keep for i in range(len(stages)))]
    return fmean(left[sum(layer >= stage for stage in stages)] for layer in range(DEPTH))


def at_cost(method: LayerMethod, share: float) -> LayerMethod:
    """The same method with the `keep` that comes to these token-layers, to six digits."""
    floor = method.floor / method.keep if isinstance(method, foveate.PSigmoid) else 0.0

    def drawn(keep: float) -> LayerMethod:
        return dataclasses.replace(method, keep=keep, **({"floor": floor * keep} if floor else {}))

    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(drawn(middle)) < share else (low, middle)
    return drawn(round(high, 6))


def methods(folder: Path) -> Iterator[tuple[str, LayerMethod]]:
    """Names and methods; those of a search where it has been made."""
    yield "random_layer", foveate.get_method("random_layer", keep=0.5)
    yield "fastv", foveate.get_method("fastv", keep=0.5)
    yield "fastv:layer=1", foveate.get_method("fastv", keep=0.5, layer=1)
    yield "pyramiddrop", foveate.get_method("pyramiddrop", keep=0.5)
    for name in FOUND:
        if (folder / f"{name}.json").exists():
            yield f"{name}, searched", foveate.Method.from_pretrained(folder / f"{name}.json")
    yield "psigmoid", foveate.get_method("psigmoid")


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=512, help="how many questions")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--found", type=Path, default=Path("benchmarks/results/search"), help="schedules of the searches"
    )
    parser.add_argument("--out", type=Path, help="the folder of results")
    options = parser.parse_args()
    console = Console(stderr=True)
    torch.set_num_threads(1)  # more of them wait for each other longer than they compute
    chosen = dict(methods(options.found))
    if missing := [name for name in FOUND if f"{name}, searched" not in chosen]:
        console.print(f"left out: {', '.join(missing)} is not in {options.found} (foveate search)")
    settings = {"data": f"glimpse {glimpse.HELDOUT_VERSION}", "count": options.count, "batch_size": options.batch_size}
    settings |= {"device": "cpu", "dtype": "float32"}
    model, processor = glimpse.load()
    batches = Batches(processor, from_glimpse(options.count), options.batch_size)
    with Results(options.out, "schedules", settings, keys=("method", "keep")) as results:
        for share in (1.0, *SHARES):
            drawn = {name: at_cost(method, share) for name, method in chosen.items() if share < 1}
            variants = [Variant(name, method.keep, (method,)) for name, method in drawn.items()]
            more = {"token_layers": share}
            measure(model, processor, batches, variants, results, groups=GROUPS, more=more, console=console)
    print(markdown([results.folder], "method,accuracy", across="token_layers"))


if __name__ == "__main__":
    run_script(main)
