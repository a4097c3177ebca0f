"""How few image tokens can be promised: one keep for all, a mass, a cascade, and the oracle, on glimpse.

python benchmarks/calibrate.py

Every policy is calibrated on 300 questions for 95 % agreement with the untouched model at 90 % confidence, and what it
was promised is asked 200 others, which nothing has seen. The oracle knows of each of these the least keep of the grid
from which on its answer is the untouched model's. `kept` counts all tries of a cascade. Runs offline, on a CPU core.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

import foveate
from foveate import glimpse
from foveate.asking.options import Variant
from foveate.evaluation.accuracy import progress_bar
from foveate.evaluation.calibrate import FIRST
from foveate.evaluation.calibrate_questions import Asked, Column
from foveate.evaluation.calibrate_report import Found
from foveate.evaluation.guarantees import Rule
from foveate.evaluation.losses import LOSSES
from foveate.evaluation.policies import Judge, cascade, climb, descend
from foveate.evaluation.questions import from_glimpse
from foveate.evaluation.results import Results, Row, run_script
from foveate.evaluation.runner import Batches
from foveate.evaluation.scores import interval
from foveate.evaluation.search_questions import Notes
from foveate.evaluation.tables import markdown
from foveate.methods.mass import by_mass

METHODS = "csp,visual_snapkv,divprune,fopru"
KEEPS = (0.7, 0.5, 0.25, 0.1)
MASSES = (0.99, 0.9, 0.8)
RUNGS = (0.25,)
FRESH = 850_000  # of glimpse's questions, the first that the promise is tested on
RISK, ERROR = 0.05, 0.1
POLICIES = ("fixed", "cascade", "oracle", "mass")
MARKS = {"fixed": "*", "cascade": "D"}


def held_out(found: Found, fresh: Asked, whole: Column) -> tuple[list[str], list[float]]:
    """What the promised policy says to the fresh questions, and the share of tokens it reads for that."""
    column = whole
    if found.best is not None and found.rungs:
        columns = [[s for s in fresh.ask(dataclasses.replace(found.method, keep=keep)) if s] for keep in found.rungs]
        column, kept = climb(columns, whole, found.best.at)
        return [said.text for said in column if said], kept.tolist()
    if found.best is not None:
        column = fresh.ask(found.chosen())
    return [said.text for said in column if said], [said.kept for said in column if said]


def row(found: Found, name: str, fresh: Asked, whole: Column) -> Row:
    """Of one policy."""
    texts, kept = held_out(found, fresh, whole)
    same = [text == said.text for text, said in zip(texts, whole, strict=True) if said]
    low, high = interval(same)
    best = found.best
    return {
        "method": name,
        "policy": found.policy,
        "promised": str(found),
        "kept_calibration": found.kept,
        "errors_calibration": best.lost if best else 0,
        "asked": sum(point.asked for point in found.points) if not found.rungs else found.points[0].asked,
        "seconds": round(found.seconds, 1),
        "kept": float(np.mean(kept)),
        "agreement": float(np.mean(same)),
        "agreement_low": low,
        "agreement_high": high,
    }


def oracle(method: foveate.Method, name: str, fresh: Asked, whole: Column) -> Row:
    """Of the oracle, and the agreement at each keep."""
    least, curve = np.ones(len(whole)), Row()
    agrees = np.ones(len(whole), bool)
    for keep in KEEPS:
        column = [said for said in fresh.ask(dataclasses.replace(method, keep=keep)) if said]
        same = np.array([said.text == other.text for said, other in zip(column, whole, strict=True) if other])
        curve[f"agreement:{keep}"] = float(same.mean())
        agrees &= same
        least = np.where(agrees, [said.kept for said in column], least)
    return {"method": name, "policy": "oracle", "promised": "", "kept": float(least.mean()), "agreement": 1.0, **curve}


def plot(rows: list[Row], path: Path) -> None:
    """Of the fresh questions, agreement over kept tokens at every keep, and where each policy was certified."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(row["method"] for row in rows))}
    for row in rows:
        colour, at = colours[row["method"]], (100 * row["kept"], 100 * row["agreement"])
        if row["policy"] == "oracle":
            shares = [(100.0, 100.0), *((100 * keep, 100 * row[f"agreement:{keep}"]) for keep in KEEPS)]
            axes.plot(*zip(*shares, strict=True), color=colour, alpha=0.5)
        elif row["policy"] in MARKS:
            axes.plot(*at, MARKS[row["policy"]], color=colour, markersize=12, label=f"{row['method']}, {row['policy']}")
    axes.axhline(100 * (1 - RISK), color="grey", linestyle=":", label="demanded")
    axes.set_xlabel("image tokens kept, % (of a cascade: all tries)")
    axes.set_ylabel("answers as the untouched model's, %")
    axes.set_ylim(80, 100.5)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--count", type=int, default=300, help="questions to calibrate with")
    parser.add_argument("--fresh", type=int, default=200, help="questions to confirm with")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("results/calibrate"), help="the folder of results")
    parser.add_argument("--plot", type=Path, help="where to draw what was found")
    options = parser.parse_args()
    console = Console(stderr=True)
    torch.set_num_threads(1)  # more of them wait for each other longer than they compute
    settings = {"data": f"glimpse {glimpse.HELDOUT_VERSION}", "count": options.count, "fresh": options.fresh}
    settings |= {"batch_size": options.batch_size, "agree": 1 - RISK, "confidence": 1 - ERROR, "loss": "exact"}
    settings |= {"device": "cpu", "dtype": "float32"}
    results = Results(options.out, "calibrate", settings, keys=("method", "policy"))
    model, processor = glimpse.load()
    names = options.methods.split(",")
    due = [name for name in names if any(not results.find(method=name, policy=p) for p in POLICIES)]
    with results, progress_bar(console) as progress:
        sets = []
        for count, first in ((options.count, FIRST), (options.fresh, FRESH)):
            batches = Batches(processor, from_glimpse(count, None, first), options.batch_size)
            notes = Notes(options.out / f".answers-{first}.partial", {**settings, **results.versions}, "benchmark")
            bar = progress.add_task(str(first), total=len(batches) * len(due) * 8)
            sets.append(Asked(model, processor, batches, notes, 64, lambda bar=bar: progress.advance(bar)))
        asked, fresh = sets
        rule = Rule("binomial", RISK, ERROR)
        judge = Judge(asked.ask(None), LOSSES["exact"], rule, {"all": list(range(len(asked)))})
        whole = fresh.ask(None)
        for policy in POLICIES:
            for name in names:
                if results.find(method=name, policy=policy):
                    continue
                method = foveate.get_method(name, keep=KEEPS[0])
                variant = Variant(name, KEEPS[0], (method,))
                if policy == "oracle":
                    results.add(oracle(method, name, fresh, whole))
                    continue
                if policy == "cascade":
                    found = cascade(asked, variant, RUNGS, judge)
                elif policy == "mass":
                    massed = dataclasses.replace(variant, methods=(by_mass(method, MASSES[0]),))
                    found = descend(asked, massed, MASSES, judge, mass=True)
                else:
                    found = descend(asked, variant, KEEPS, judge, mass=False)
                results.add(row(found, name, fresh, whole))
                console.print(f"{name} {policy}: {results.rows[-1]}", markup=False, highlight=False)
    if options.plot:
        plot(results.rows, options.plot)
    print(markdown([results.folder], "method,kept", across="policy"))


if __name__ == "__main__":
    run_script(main)
