"""The options of this library's own choosing, side by side, on questions that no table uses.

python benchmarks/defaults.py

Which rows of the prompt rank what stays in the cache (`plphp`, `aircache`), how far PLPHP's layers move from `keep`
(`delta`), which layer and attention of the vision encoder FoPru reads, and which method before the LLM `foveate ask`
takes where none is named: one that needs no trained weights. The questions are those of glimpse from number 500,000
on, with answers of more than one word, since evictions behind the prefill hardly change others. Runs offline, on two
CPU cores in about twenty minutes.
"""

import argparse
from pathlib import Path
from typing import Any

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
from foveate.methods.grammar import Part

FIRST = 500_000
KEEPS = (0.5, 0.25, 0.1)
CANDIDATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("random_cache", {}),
    *(("plphp", {"rows": rows, "delta": delta}) for rows in (1, 4, None) for delta in (0.0, 0.3)),
    ("plphp", {"rows": None, "delta": 0.1}),
    *(("aircache", {"alpha": alpha}) for alpha in (0.9, 0.5, 0.0)),
    ("random", {}),
    *((name, {}) for name in ("uniform", "divprune", "cdpruner", "mmtok", "scope", "apet")),
    *(("fopru", {"back": back}) for back in (0, 1, 2)),
    *(("fopru", {"back": back, "attention": "cls"}) for back in (0, 1)),
)


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many questions")
    parser.add_argument("--batch-size", type=int, default=30)
    parser.add_argument("--out", type=Path, help="the folder of results")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more of them wait for each other longer than they compute
    model, processor = glimpse.load()
    batches = Batches(processor, from_glimpse(options.count, GROUPS["more_words"], FIRST), options.batch_size)
    settings = {"data": f"glimpse {glimpse.HELDOUT_VERSION}", "first": FIRST, "count": options.count}
    settings |= {"device": "cpu", "dtype": "float32", "batch_size": options.batch_size}
    variants = [
        Variant(str(Part(name, more)), keep, (foveate.get_method(name, keep=keep, **more),))
        for name, more in CANDIDATES
        for keep in KEEPS
    ]
    with Results(options.out, "defaults", settings, keys=("method", "keep")) as results:
        measure(model, processor, batches, variants, results, groups={}, console=Console(stderr=True))
    print(markdown([results.folder], "method,accuracy", across="keep"))


if __name__ == "__main__":
    run_script(main)
