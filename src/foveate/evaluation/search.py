"""`foveate search`: from what the user wrote to a schedule that loses no more than allowed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from foveate.asking.loading import (
    GLIMPSE,
    built_in,
    check_dtype,
    dtype_name,
    hush,
    load,
    resolve_device,
)
from foveate.asking.mistake import Mistake, one_line
from foveate.asking.options import variants
from foveate.asking.subject import fingerprints
from foveate.families import get_family
from foveate.methods import get_method
from foveate.methods.gsearch import GSearch
from foveate.methods.psigmoid import PSigmoid
from foveate.methods.schedules import ScheduledMethod

from .accuracy import MATCHES
from .questions import FILE, Item, from_folder, split
from .rankings import agreement
from .results import Row, write
from .runner import Batches
from .schedules import BUDGETS, Rates, Trial, Trials, greedy, least_curve, settle
from .search_questions import Notes, Part, Questions, mean
from .search_report import Found, percent
from .workplace import check_data, check_out, device_name, fitting, known_family, own_questions, some, usable

FIRST = 500_000  # of glimpse's questions: tables are made of the first ones
FEWEST = 20  # questions of either part
RANKED = 64  # questions whose pictures are ranked in every layer
SEARCH = ("method", "tolerance", "options", "grid")  # decide which schedules are asked, not what they answer
GRID = tuple(count / 144 for count in (4, 12, 24, 36, 54, 72, 108, 120, 132))


@dataclass(frozen=True)
class Options:
    """What decides the schedule, as `foveate search` takes it."""

    model: str
    method: str
    data: str | None
    tolerance: float
    score: str
    options: dict[str, Any]
    grid: tuple[float, ...] | None
    count: int
    test: int
    batch_size: int
    max_new_tokens: int
    match: str
    seed: int
    device: str
    dtype: str
    attn: str | None


def search(options: Options, out: Path, console: Console) -> Found:
    """Look for the schedule, and write it.

    Raises:
        Mistake: for what the user got wrong, and where nothing can go.
    """
    _check(options, out)
    hush()
    with console.status("loading, and preparing the questions"):
        model, notes, parts, bad = _prepare(options, out)
    for line in some(f"{FILE}, line {line}: {why}" for line, why in sorted(bad)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    try:
        found = _seek(options, model, notes, parts, console)
    except KeyboardInterrupt:
        line = f"stopped: what was asked is in {notes.path}; the same command goes on there"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        raise
    settings = {**notes.settings, **{name: getattr(options, name) for name in SEARCH}}
    write(out, json.dumps(found.to_dict(settings), indent=1) + "\n")
    notes.path.unlink(missing_ok=True)
    return found


def _check(options: Options, out: Path) -> None:
    """What can be refused before anything is loaded."""
    if options.method not in ("gsearch", "psigmoid"):
        raise Mistake(f"--method {options.method} has no schedule to search for: use gsearch or psigmoid")
    if not 0 <= options.tolerance < 1:
        raise Mistake(f"--tolerance {options.tolerance} is no loss in [0, 1): give a part of all answers, such as 0.01")
    if options.score not in ("accuracy", "agreement"):
        raise Mistake(f"--score {options.score} is unknown: use accuracy, or agreement with the untouched model")
    if options.match not in MATCHES:
        raise Mistake(f"--match {options.match} is unknown: use {' or '.join(MATCHES)}")
    if wrong := set(options.options) & {"keep", "rates", "schedule", "steepness", "floor"}:
        raise Mistake(f"-o {sorted(wrong)[0]}: that is what is searched for; leave it out")
    try:
        get_method(options.method, **options.options)
    except ValueError as error:
        raise Mistake(one_line(error)) from error
    grid = options.grid
    if grid is not None and (not grid or list(grid) != sorted(set(grid)) or not 0 <= grid[0] <= grid[-1] < 1):
        raise Mistake(f"--grid {','.join(map(str, grid))}: give ascending fractions in [0, 1), such as 0.25,0.5,0.75")
    if grid is not None and grid[0] == 0 and (options.method == "psigmoid" or len(grid) == 1):
        raise Mistake("--grid: a schedule that keeps nothing is none; give fractions above 0")
    if min(options.count, options.test) < FEWEST:
        raise Mistake(f"--count and --test must be at least {FEWEST}: fewer questions say nothing of 0.01")
    check_dtype(options.dtype, options.attn)
    check_data(options.model, options.data)
    check_out(out)


def _prepare(options: Options, out: Path) -> tuple[Any, Notes, tuple[Questions, Questions], list[tuple[int, str]]]:
    """The model, what is known already, the questions of the search and of the test, and rows that cannot be used."""
    source, dtype = built_in(options.model, options.dtype)
    device = resolve_device(options.device)
    config, family = known_family(source)
    (chosen, *_), _ = variants(options.method, [0.5], family.places, config.model_type)
    settings: Row = {name: value for name, value in asdict(options).items() if name not in SEARCH}
    settings |= {"dtype": dtype_name(dtype, config), "device": device_name(device)}
    settings |= fingerprints(options.model)
    settings |= {name: version(name) for name in ("foveate", "torch", "transformers")}
    sets, bad = _questions(options, settings)
    if min(map(len, sets)) < FEWEST:
        raise Mistake(
            f"too few questions: {len(sets[0])} to search with, and {len(sets[1])} others, about other pictures, to "
            f"test with; at least {FEWEST} of each are needed: write more into {options.data}, or lower --count"
        )
    notes = Notes(out.with_name(f"{out.name}.partial"), settings)
    model, processor = load(source, config, device=device, dtype=dtype, attn=options.attn)
    list(fitting(model, [chosen], []))
    how: Row = {name: getattr(options, name) for name in ("score", "match", "max_new_tokens")}
    seek, test = (
        Questions(name, model, processor, usable(processor, items, options.batch_size, bad), notes, **how)
        for name, items in zip(("search", "test"), sets, strict=True)
    )
    return model, notes, (seek, test), bad


def _questions(options: Options, settings: Row) -> tuple[tuple[list[Item], list[Item]], list[tuple[int, str]]]:
    """The questions of both parts, and the rows that cannot be used."""
    if options.data in (None, GLIMPSE):
        settings["data"], ask, _ = own_questions(options.model, options.data)
        return (ask(options.count, FIRST), ask(options.test, 0)), []
    assert options.data is not None
    labelled = options.score == "accuracy"
    try:
        items, bad, settings["digest"] = from_folder(options.data, MATCHES[options.match], labelled)
    except Mistake as mistake:
        if not labelled:
            raise
        from_folder(options.data, MATCHES[options.match], labelled=False)  # or why not: answers are not what lacks
        raise Mistake(f"{mistake}; --score agreement needs no answers") from mistake
    settings["data"] = Path(options.data).resolve().name
    return split(items, options.count, options.test, options.seed), bad


def _seek(options: Options, model: Any, notes: Notes, parts: tuple[Questions, Questions], console: Console) -> Found:
    seek, test = parts
    depth = _depth(model)
    whole = [int(hit or 0) for hit in seek.hits(None)]
    bar = mean(whole) - options.tolerance

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    def ask(rates: Rates) -> Trial:
        hits = seek.hits(GSearch(rates=rates, **options.options), needed=bar)
        asked = [(one, int(hit)) for one, hit in zip(whole, hits, strict=True) if hit is not None]
        lost = np.array([one - hit for one, hit in asked], float)
        trial = Trial(mean([hit for _, hit in asked]), float(lost.std()) / math.sqrt(len(asked)))
        found = f"scores {100 * trial.score:.1f}" + f" on {len(asked)} questions, and stops" * (len(asked) < len(hits))
        say(f"{len(trials.asked) + 1}: {percent(rates)} {found}; {100 * bar:.1f} are needed")
        return trial

    trials = Trials(ask, bar - 1e-9)
    method: ScheduledMethod
    if options.method == "gsearch":
        grid = options.grid or GRID
        rates = settle(trials, greedy(trials, depth - 1, grid), grid)
        smallest = max(rates) <= min(rate for rate in grid if rate)
        nothing = min(rates) == 1.0
        method = GSearch(rates=rates, **options.options)
    else:
        grid = options.grid or BUDGETS
        curve = least_curve(trials, depth - 1, options.seed, grid)
        nothing, smallest = curve is None, curve is not None and curve.keep == grid[0]
        if curve is not None:
            method = PSigmoid(**asdict(curve), **options.options)
            rates = curve.rates(depth - 1)
    if nothing:
        raise Mistake(
            f"nothing can go: every schedule of the grid loses more than --tolerance {options.tolerance:g} of "
            f"{len(seek)} answers; allow more, or try a --grid nearer to 1 (what was asked is kept in {notes.path})"
        )
    few = [seek.batches.items[index] for index in range(0, len(seek), max(1, len(seek) // RANKED))]
    ranked = Batches(seek.processor, few, options.batch_size)
    plain = get_method(options.method, **options.options)
    assert isinstance(plain, ScheduledMethod)
    tau = agreement(model, seek.processor, ranked, plain.score)
    return Found(
        method,
        rates,
        options.tolerance,
        Part.of(seek, method, options.seed),
        Part.of(test, method, options.seed),
        len(trials.asked),
        trials.contradictions(),
        tau.tolist(),
        smallest,
    )


def _depth(model: Any) -> int:
    family = get_family(model.config)
    assert family is not None
    return len(family.decoder(family.base(model)).layers)
