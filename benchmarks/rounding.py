"""How far rounding alone moves the logits in `foveate check`: units in the last place of the largest logit.

    python benchmarks/rounding.py

Random LLaVA models of 4 to 64 layers, three methods of three places, two sets of weights, eager and sdpa. The largest
of each dtype is what `ROUNDING` in foveate.evaluation.reference must leave room for; beside it, the smallest
difference from a reference that masks nothing, which must stay out. Writes benchmarks/results/rounding.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
import tiny  # noqa: E402

import foveate  # noqa: E402
from foveate.evaluation.reference import ROUNDING, prove  # noqa: E402

DEPTHS = (4, 16, 32, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METHODS = ("fopru", "fastv", "plphp")


def units(dtype: torch.dtype, attn: str, seed: int, name: str) -> tuple[float, float]:
    """The largest difference from the reference, and from one that masks nothing."""
    model, batch = tiny.build("llava", attn, seed).to(dtype), tiny.inputs("llava")
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    proof = prove(model, batch, [foveate.get_method(name, keep=0.25)], steps=6)
    unit = torch.finfo(dtype).eps * proof.scale
    return proof.difference / unit, max(step.unhidden for step in proof.steps) / unit


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for depth in track(DEPTHS, description="depths"):
        tiny._template.cache_clear()
        tiny.LLM["num_hidden_layers"] = depth
        for dtype in DTYPES:
            cases = [units(dtype, a, s, m) for a in ("eager", "sdpa") for s in (0, 1) for m in METHODS]
            masked, unmasked = zip(*cases, strict=True)
            name = str(dtype).removeprefix("torch.")
            rows.append({"layers": depth, "dtype": name, "rounding": max(masked), "unmasked": min(unmasked)})
    table = Table("layers", "dtype", "rounding, at most", "without masking, at least", "allowed")
    for row in rows:
        allowed = ROUNDING[getattr(torch, row["dtype"])]
        table.add_row(
            str(row["layers"]), row["dtype"], f"{row['rounding']:.1f}", f"{row['unmasked']:.0f}", str(allowed)
        )
    Console().print(table)
    versions = {module.__name__: module.__version__ for module in (foveate, torch, transformers)}
    about = {"command": "python benchmarks/rounding.py", "versions": versions}
    (HERE / "results" / "rounding.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
