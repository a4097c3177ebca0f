"""The tests' proof as figures: the largest logit difference between pruned models and their dense references.

    python benchmarks/proof.py

Every method on every family it fits, batch 1 and left-padded batch 3, greedy, beam search and sampling, eager and
sdpa, float32. The tests assert the same limits; this records by how much they are met. Ten minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import foveate
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.tables import markdown

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "engine"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "methods"))
import oracle
import test_contrast
import test_merging_cache
import test_merging_encoder
import tiny
from cases import FITS, METHODS, OWN_FILES
from test_guided import guide_of

# The options under which the files of their own prove the methods that no mask imitates.
OWN: dict[str, dict[str, Any]] = {
    "sgl": {"keep": 0.5, "layer": 2},
    "elastic_cache": {"keep": 0.75, "decode_distance": 5},
    "zipvl": {"keep": 0.5, "threshold": 1.0},
    "mint": test_contrast.MINT,
    **test_merging_encoder.METHODS,
}
assert OWN.keys() == OWN_FILES.keys()


def from_reference(family: str, name: str, spec: dict, batch: dict, run: oracle.Run, report: Any) -> float:
    """Largest difference from the reference that the tests have for a method."""
    copies = len(report.layers[0].kept) // len(batch["input_ids"])  # rows that the prefill runs for a sample
    if name in test_merging_encoder.METHODS:
        dense, _ = test_merging_encoder.reference(
            family, name, batch, spec["images"], run.sequences, run.rows // copies
        )
    elif name == "elastic_cache":
        options = OWN[name]
        plain = test_merging_cache.Dense(family, batch, spec["images"], options["keep"])
        dense = plain.logits(run, options["decode_distance"], copies)
    else:
        model, hides = tiny.build(family, "eager"), oracle.hidden(report, batch["input_ids"].shape[1])
        with test_merging_cache.silenced(model, report, run.rows) if name == "zipvl" else nullcontext():
            return float(oracle.errors(model, batch, run, hides).max())
    return float((dense - run.logits).abs().max())


def differences(
    family: str, name: str, options: dict[str, Any], spec: dict, attn: str, decoding: str
) -> tuple[float, float]:
    """Largest logit difference from the dense reference, and at keep = 1.0 from the untouched model."""
    batch, kwargs, model = tiny.inputs(family, **spec), oracle.DECODING[decoding], tiny.build(family, attn)
    if name == "sgl":
        options = {**options, "guide": guide_of(family)}
    if name == "mint":
        largest = test_contrast.check(family, batch, attn, **test_contrast.DECODING[decoding])
    else:
        with foveate.prune(model, name, record=True, **options) as pruned:
            run = oracle.run(model, batch, **kwargs)
        largest = from_reference(family, name, spec, batch, run, pruned.report)
    untouched = oracle.run(model, batch, **kwargs)
    with foveate.prune(model, name, **options | {"keep": 1.0}):
        everything = oracle.run(model, batch, **kwargs)
    return largest, float((everything.logits - untouched.logits).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of results")
    torch.set_num_threads(1)
    matrix = [(family, *METHODS[name]) for family, name in FITS]
    matrix += [(family, name, options) for name, options in OWN.items() for family in tiny.CORE_DECODERS]
    settings = {"models": "tiny, random", "dtype": "float32", "device": "cpu", "threads": 1, "seed": 0}
    with Results(parser.parse_args().out, "proof", settings, keys=("method", "options", "family")) as results:
        for family, name, options in track(matrix, description="methods x families"):
            named = {"method": name, "options": ", ".join(f"{k}={v}" for k, v in options.items()), "family": family}
            if results.find(**named):
                continue
            cases = [
                differences(family, name, options, spec, attn, decoding)
                for spec, attn, decoding in product(tiny.BATCHES.values(), ("eager", "sdpa"), oracle.DECODING)
            ]
            largest, at_one = (
                torch.tensor(cases, dtype=torch.float64).amax(0).tolist()
            )  # no number counts as the largest
            row = named | {"place": foveate.method_class(name).place, "cases": len(cases)}
            row["steps"] = test_contrast.STEPS if name == "mint" else oracle.STEPS
            results.add(row | {"largest_difference": largest, "at_keep_1": at_one})
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
