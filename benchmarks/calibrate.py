"""How few image tokens can be promised, by every method: one keep for all, a mass, a cascade, the oracle.

python benchmarks/calibrate.py --jobs 2

Every policy is calibrated on 300 questions for 95 % agreement with the untouched model at 90 % confidence, and what it
was promised is asked 200 others, which nothing has seen. The oracle knows of each of these the least keep of the grid
from which on its answer is the untouched model's. `kept` counts all tries of a cascade; of methods that drop nothing
and choose for each step it is the share of the cache that steps read. Runs offline, on CPU cores.
"""

import argparse
import dataclasses
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import foveate
from foveate import glimpse
from foveate.asking.loading import GLIMPSE, load_guide
from foveate.asking.options import check_alone, variants
from foveate.asking.variant import Variant
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
from foveate.evaluation.search_questions import Memory, Notes
from foveate.evaluation.tables import markdown
from foveate.evaluation.workplace import fitting, known_family
from foveate.methods.base import VideoMethod
from foveate.methods.mass import adds_up, by_mass

DRAWN = ("csp", "visual_snapkv", "divprune", "fopru")  # curves of all would hide each other
KEEPS = (0.7, 0.5, 0.25, 0.1)
MASSES = (0.99, 0.9, 0.8)
RUNGS = (0.25,)
FRESH = 850_000  # of glimpse's questions, the first that the promise is tested on
RISK, ERROR = 0.05, 0.1
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
    """Of some methods on the fresh questions, agreement over kept tokens, and where each policy was certified."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    drawn = [row for row in rows if row["method"] in DRAWN]
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(row["method"] for row in drawn))}
    for row in drawn:
        colour, at = colours[row["method"]], (100 * row["kept"], 100 * row["agreement"])
        if row["policy"] == "oracle":
            shares = [(100.0, 100.0), *((100 * keep, 100 * row[f"agreement:{keep}"]) for keep in KEEPS)]
            axes.plot(*zip(*shares, strict=True), color=colour, alpha=0.5)
        elif row["policy"] in MARKS:
            axes.plot(*at, MARKS[row["policy"]], color=colour, markersize=12, label=f"{row['method']}, {row['policy']}")
    axes.axhline(100 * (1 - RISK), color="grey", linestyle=":", label="demanded")
    axes.set_xlabel("image tokens kept, % (of a cascade: in all tries)")
    axes.set_ylabel("answers as the untouched model's, %")
    axes.set_ylim(80, 100.5)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def chosen(methods: str) -> tuple[list[Variant], list[str]]:
    """The methods that take every keep on glimpse, and a line for each other one.

    methods: as `foveate calibrate` takes it; `all` are those that look at pictures and run no untouched model beside,
    each with its own defaults.
    """
    source = str(glimpse.PATH)
    config, family = known_family(source)
    check_alone(methods)
    found, left_out = variants(methods, KEEPS, family.places, config.model_type, seed=0, guide=GLIMPSE)
    found = [each for each in found if each.named or (":" not in each.label and _saves_on_pictures(each.method))]
    load_guide([variant.method for variant in found], None, source, config, device="cpu", dtype="float32")
    found = list(fitting(glimpse.load()[0], found, left_out))
    labels = [variant.label for variant in found]
    return [each for each in found if each.keep == KEEPS[0] and labels.count(each.label) == len(KEEPS)], left_out


def _saves_on_pictures(method: foveate.Method) -> bool:
    return not isinstance(method, VideoMethod) and method.place != "logits"


class Place:
    """A model and its questions, where one method after the other is measured.

    partial: where answers are kept until a method's rows are whole. settings: what those must be of.
    """

    def __init__(self, count: int, fresh: int, batch_size: int, partial: Path, settings: Row) -> None:
        torch.set_num_threads(1)  # more of them wait for each other longer than they compute
        self.partial, self.settings = partial, settings
        model, processor = glimpse.load()
        sets = []
        for number, first in ((count, FIRST), (fresh, FRESH)):
            batches = Batches(processor, from_glimpse(number, None, first), batch_size)
            sets.append(Asked(model, processor, batches, Memory(), 64))
        self.asked, self.fresh = sets
        self.everything = {"all": list(range(count))}
        self.judge = Judge(self.asked.ask(None), LOSSES["exact"], Rule("binomial", RISK, ERROR), self.everything)
        self.whole = self.fresh.ask(None)

    def rows(self, name: str) -> list[Row]:
        """Of one method, a row a policy; no row of a mass where its scores make up none."""
        ((variant, *_), _) = chosen(name)
        with self._noted(name) as (asked, fresh):
            found = [descend(asked, variant, KEEPS, self.judge, mass=False), cascade(asked, variant, RUNGS, self.judge)]
            if adds_up(type(variant.method)):
                massed = dataclasses.replace(variant, methods=(by_mass(variant.method, MASSES[0]),))
                found.append(descend(asked, massed, MASSES, self.judge, mass=True))
            rows = [row(each, name, fresh, self.whole) for each in found]
            return [*rows, oracle(variant.method, name, fresh, self.whole)]

    @contextmanager
    def _noted(self, name: str) -> Iterator[list[Asked]]:
        """The questions, with what an interrupted run was told by this method already."""
        files = [self.partial.with_name(f"{self.partial.name}-{name}-{what}") for what in ("asked", "fresh")]
        notes = [Notes(file, self.settings, "benchmark") for file in files]
        yield [dataclasses.replace(a, notes=n) for a, n in zip((self.asked, self.fresh), notes, strict=True)]
        for file in files:
            file.unlink(missing_ok=True)


place: Place


def begin(*arguments: Any) -> None:
    """In a process of its own."""
    global place
    place = Place(*arguments)


def work(name: str) -> list[Row]:
    """In that process."""
    return place.rows(name)


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="all")
    parser.add_argument("--count", type=int, default=300, help="questions to calibrate with")
    parser.add_argument("--fresh", type=int, default=200, help="questions to confirm with")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=1, help="processes that ask at once, each with a model of its own")
    parser.add_argument("--out", type=Path, default=Path("results/calibrate"), help="the folder of results")
    parser.add_argument("--plot", type=Path, help="where to draw what was found")
    options = parser.parse_args()
    console = Console(stderr=True)
    settings = {"data": f"glimpse {glimpse.HELDOUT_VERSION}", "count": options.count, "fresh": options.fresh}
    settings |= {"batch_size": options.batch_size, "agree": 1 - RISK, "confidence": 1 - ERROR, "loss": "exact"}
    settings |= {"device": "cpu", "dtype": "float32"}
    results = Results(options.out, "calibrate", settings, keys=("method", "policy"))
    found, left_out = chosen(options.methods)
    for line in left_out:
        console.print(f"left out: {line}", markup=False, highlight=False, soft_wrap=True)
    due = [variant.label for variant in found if not results.find(method=variant.label, policy="oracle")]
    arguments = options.count, options.fresh, options.batch_size, options.out / ".answers", settings | results.versions
    context = multiprocessing.get_context("spawn")
    with results, progress_bar(console) as progress:
        bar = progress.add_task("methods", total=len(found), completed=len(found) - len(due))
        with ProcessPoolExecutor(options.jobs, context, begin, arguments) as pool:
            for done in as_completed([pool.submit(work, name) for name in due]):
                for each in done.result():  # the oracle's is the last: what has it is whole
                    if not results.find(method=each["method"], policy=each["policy"]):
                        results.add(each)
                    console.print(
                        f"{each['method']} {each['policy']}: {each['promised']}, {each['kept']:.3f} kept, "
                        f"{each['agreement']:.3f} agree",
                        markup=False,
                        highlight=False,
                        soft_wrap=True,
                    )
                progress.advance(bar)
    if options.plot:
        plot(results.rows, options.plot)
    print(markdown([results.folder], "method,kept", across="policy"))


if __name__ == "__main__":
    run_script(main)
