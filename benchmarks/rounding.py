"""How far rounding alone moves the logits in `foveate check`: units in the last place of the largest logit.

    python benchmarks/rounding.py

Random LLaVA models of 4 to 64 layers, three methods of three places, two sets of weights, eager and sdpa. The largest
of each dtype is what `ROUNDING` in foveate.evaluation.proving must leave room for; `unmasked`, the smallest
difference from a reference that masks nothing, must stay out.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

import torch
from rich.progress import track

import foveate
from foveate.evaluation.proving import ROUNDING, prove
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.tables import markdown
from foveate.testing.tiny import building

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny

DEPTHS = (4, 16, 32, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METHODS = ("fopru", "fastv", "plphp")
SEEDS = (0, 1)


def units(dtype: torch.dtype, attn: str, seed: int, name: str) -> tuple[float, float]:
    """The largest difference from the reference, and from one that masks nothing."""
    model, batch = tiny.build("llava", attn, seed).to(dtype), tiny.inputs("llava")
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    proof = prove(model, batch, [foveate.get_method(name, keep=0.25)], steps=6)
    unit = torch.finfo(dtype).eps * proof.scale
    return proof.difference / unit, max(step.unhidden for step in proof.steps) / unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of results")
    torch.set_num_threads(1)
    settings = {"models": "tiny, random", "device": "cpu", "threads": 1, "seeds": list(SEEDS)}
    with Results(parser.parse_args().out, "rounding", settings, keys=("layers", "dtype")) as results:
        for depth, dtype in track(list(product(DEPTHS, DTYPES)), description="depths x dtypes"):
            named = {"layers": depth, "dtype": str(dtype).removeprefix("torch.")}
            if results.find(**named):
                continue
            building._template.cache_clear()
            tiny.LLM["num_hidden_layers"] = depth
            cases = [units(dtype, *case) for case in product(("eager", "sdpa"), SEEDS, METHODS)]
            masked, unmasked = zip(*cases, strict=True)
            both = torch.tensor([masked, unmasked], dtype=torch.float64)
            most, least = float(both[0].amax()), float(both[1].amin())  # no number counts as either
            results.add(named | {"rounding": most, "allowed": ROUNDING[dtype], "unmasked": least})
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
