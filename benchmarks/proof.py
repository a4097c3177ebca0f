"""The oracle's matrix as figures: the largest logit difference between pruned models and the dense reference.

    python benchmarks/proof.py

Every method on every family it fits, batch 1 and left-padded batch 3, greedy, beam search and sampling, eager and
sdpa, 20 steps, float32. The tests assert the same limits; this prints by how much they are met, and writes
benchmarks/results/proof.json.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
import oracle  # noqa: E402
import tiny  # noqa: E402
from cases import FITS, prune, pruned_run  # noqa: E402


def differences(family: str, name: str, batch_name: str, attn: str, decoding: str) -> tuple[float, float]:
    """Largest logit difference from the dense reference, and at keep = 1.0 from the untouched model."""
    batch, kwargs = tiny.inputs(family, **tiny.BATCHES[batch_name]), oracle.DECODING[decoding]
    model = tiny.build(family, attn)
    run, report = pruned_run(model, name, batch, **kwargs)
    hides = oracle.hidden(report, batch["input_ids"].shape[1])
    dense = float(oracle.errors(tiny.build(family, "eager"), batch, run, hides).max())
    untouched = oracle.run(model, batch, **kwargs)
    with prune(model, name, keep=1.0):
        everything = oracle.run(model, batch, **kwargs)
    return dense, float((everything.logits - untouched.logits).abs().max())


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for family, name in track(FITS, description="methods x families"):
        cases = [
            differences(family, name, batch, attn, decoding)
            for batch in tiny.BATCHES
            for attn in ("eager", "sdpa")
            for decoding in oracle.DECODING
        ]
        worst, at_one = (max(column) for column in zip(*cases, strict=True))
        rows.append({"family": family, "method": name, "cases": len(cases), "dense": worst, "keep_1.0": at_one})
    table = Table("family", "method", "cases", "largest difference", "at keep 1.0")
    for row in rows:
        table.add_row(row["family"], row["method"], str(row["cases"]), f"{row['dense']:.1e}", f"{row['keep_1.0']:.1e}")
    Console().print(table)
    about = {
        "command": "python benchmarks/proof.py",
        "date": date.today().isoformat(),
        "steps": oracle.STEPS,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "cases": sum(row["cases"] for row in rows),
        "largest_difference": max(row["dense"] for row in rows),
        "largest_difference_at_keep_1.0": max(row["keep_1.0"] for row in rows),
    }
    (HERE / "results" / "proof.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
