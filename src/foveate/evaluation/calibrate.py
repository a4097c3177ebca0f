"""`foveate calibrate`: from what the user wrote to a certificate of how little may be kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from foveate.asking.loading import (
    GLIMPSE,
    built_in,
    check_dtype,
    dtype_name,
    hush,
    load,
    load_guide,
    resolve_device,
)
from foveate.asking.mistake import Mistake, one_line
from foveate.asking.options import check_alone, variants
from foveate.asking.subject import config_digest, fingerprints, option_files
from foveate.asking.variant import Variant
from foveate.engine.certified import setting
from foveate.engine.support import find_target
from foveate.errors import UnsupportedError
from foveate.methods.mass import by_mass

from .accuracy import progress_bar
from .calibrate_options import POLICIES, Options
from .calibrate_questions import Asked
from .calibrate_report import Certificate
from .guarantees import Rule
from .losses import Loss, find_loss
from .policies import Judge, cascade, descend
from .questions import FILE, Item, draw, from_folder
from .results import Row, write
from .search_questions import Notes
from .workplace import check_data, check_out, device_name, fitting, known_family, own_questions, some, usable

FIRST = 700_000  # of glimpse's questions: tables are made of the first ones, `foveate search` takes those from 500,000
ALL = "all"  # the group of all questions, where no type has a promise of its own
FREE = ("methods", "policy", "grid", "agree", "confidence", "guarantee", "loss", "groups")
"""Options that decide what is asked or how it is judged, and not what is said."""


def calibrate(options: Options, out: Path, console: Console) -> Certificate:
    """Ask, decide, and write the certificate.

    Raises:
        Mistake: for what the user got wrong, and where nothing can be promised.
    """
    loss = check(options, out)
    hush()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with console.status("loading, and preparing the questions"):
        asked, chosen, about, lines = _prepare(options, out)
    for line in lines:
        say(line)
    groups = _groups(asked.batches.items, options)
    rule = options.rule(len(chosen) * len(groups))
    _check_sample({name: len(group) for name, group in groups.items()}, rule, options)
    try:
        with progress_bar(console) as progress:
            columns = 1 + len(chosen) * len(options.steps)
            bar = progress.add_task("untouched", total=columns * len(asked.batches))
            asked.advance = lambda: progress.advance(bar)
            judge = Judge(asked.ask(None), loss, rule, groups)
            found = []
            for number, variant in enumerate(chosen):
                progress.update(bar, description=variant.label)
                if options.policy == "cascade":
                    found.append(cascade(asked, variant, options.steps, judge))
                else:
                    found.append(descend(asked, variant, options.steps, judge, mass=options.policy == "mass"))
                progress.update(bar, completed=(1 + (number + 1) * len(options.steps)) * len(asked.batches))
                if not console.is_terminal:
                    say(f"{variant.label}: {found[-1]}")
    except KeyboardInterrupt:
        say(f"stopped: what was asked is in {_partial(out)}; the same command goes on there")
        raise
    certificate = Certificate.of(options, rule, judge, found, about)
    write(out, json.dumps(certificate.to_dict(), indent=1) + "\n")
    _partial(out).unlink(missing_ok=True)
    return certificate


def check(options: Options, out: Path | None) -> Loss:
    """Refuse what can be refused before anything is loaded; the loss. out: of a certificate, where one is written."""
    if options.policy not in POLICIES:
        raise Mistake(f"--policy {options.policy} is unknown: use {', '.join(POLICIES)}")
    if options.guarantee not in ("confidence", "average"):
        raise Mistake(f"--guarantee {options.guarantee} is unknown: use confidence or average")
    for name in ("agree", "confidence"):
        if not 0 < getattr(options, name) < 1:
            raise Mistake(f"--{name} {getattr(options, name):g} is no part in (0, 1): give one such as 0.95")
    grid = options.grid
    if grid is not None:
        written = f"--grid {','.join(f'{value:g}' for value in grid)}"
        if not all(0 < value <= 1 for value in grid):
            raise Mistake(f"{written}: give fractions in (0, 1], such as 1.0,0.75,0.5,0.25")
        if 1.0 not in grid:
            raise Mistake(
                f"{written} lacks 1.0, the budget that always agrees and is the answer if no other is: add it"
            )
        if len(set(grid)) == 1:
            raise Mistake(f"{written} leaves nothing to choose: add smaller budgets, such as 1.0,0.75,0.5,0.25")
    check_alone(options.methods)
    check_dtype(options.dtype, options.attn)
    check_data(options.model, options.data)
    loss = find_loss(options.loss)
    options.rule(1).p(0, 1)  # without scipy, now
    if out is not None:
        _check_sample({ALL: options.count}, options.rule(1), options)  # before the methods and groups are known
        check_out(out)
    return loss


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _prepare(options: Options, out: Path) -> tuple[Asked, list[Variant], Row, list[str]]:
    """The questions with their model, the methods, what the certificate says of both, and lines on what is left out."""
    source, dtype = built_in(options.model, options.dtype)
    device = resolve_device(options.device)
    config, family = known_family(source)
    named = options.guide or (GLIMPSE if options.model == GLIMPSE else None)
    chosen, left_out = variants(
        options.methods, [options.steps[-1]], family.places, config.model_type, seed=options.seed, guide=named
    )
    if options.guarantee == "average" and len(chosen) > 1:
        raise Mistake("--guarantee average has no error to share among methods: give one, or use confidence")
    chosen = list(_saving(chosen, left_out))
    if options.policy == "mass":
        chosen = list(_massed(chosen, left_out))
    load_guide([each.method for each in chosen], options.guide, source, config, device=device, dtype=dtype)
    held: Row = {name: value for name, value in dataclasses.asdict(options).items() if name not in FREE}
    held |= {"dtype": dtype_name(dtype, config), "device": device_name(device)}
    held |= fingerprints(options.model, options.guide)
    held |= option_files(dataclasses.asdict(each.method) for each in chosen)
    versions = {name: version(name) for name in ("foveate", "torch", "transformers")}
    items, bad, data, lines = _questions(options)
    held |= {**versions, **data}
    notes = Notes(_partial(out), held, "calibration")
    model, processor = load(source, config, device=device, dtype=dtype, attn=options.attn)
    chosen = list(fitting(model, chosen, left_out))
    if not chosen:
        raise Mistake(f"no method is left: {left_out[-1]}")
    batches = usable(processor, items, options.batch_size, bad)
    lines += some(f"{FILE}, line {line}: {why}" for line, why in sorted(bad)) + [
        f"left out: {line}" for line in left_out
    ]
    about = {"setting": setting(find_target(model)), "data": data, "versions": versions, "model": options.model}
    about |= {"device": held["device"], "config": config_digest(config)}
    return Asked(model, processor, batches, notes, options.max_new_tokens), chosen, about, lines


def _saving(chosen: Sequence[Variant], left_out: list[str]) -> Iterator[Variant]:
    """Those that may answer with less than everything."""
    for variant in chosen:
        if variant.place != "logits":
            yield variant
            continue
        why = f"{variant.label} compares with the untouched model at every step, so that no budget saves anything"
        if variant.named:
            raise Mistake(f"{why}: calibrate another method")
        left_out.append(why)


def _massed(chosen: Sequence[Variant], left_out: list[str]) -> list[Variant]:
    found = []
    for variant in chosen:
        try:
            found.append(dataclasses.replace(variant, methods=(by_mass(variant.method, 0.5),)))
        except UnsupportedError as error:
            if variant.named:
                raise Mistake(one_line(error)) from error
            left_out.append(f"{variant.label}: {one_line(error)}")
    return found


def _questions(options: Options) -> tuple[list[Item], list[tuple[int, str]], Row, list[str]]:
    """One question a picture; rows that cannot be used; what is said of the data; lines about what was left out."""
    if options.data in (None, GLIMPSE):
        name, ask, _ = own_questions(options.model, options.data)
        return ask(options.count, FIRST), [], {"data": name, "first": FIRST}, []
    assert options.data is not None
    items, bad, digest = from_folder(options.data, labelled=False)
    alike: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        alike.setdefault(tuple(map(str, item.images)), []).append(item)
    one_each = [draw(group, 1, options.seed)[0] for group in alike.values()]
    more = len(items) - len(one_each)
    lines = [f"left out: {more} further questions about the same pictures, which are no evidence of their own"] * bool(
        more
    )
    return (
        draw(one_each, options.count, options.seed),
        bad,
        {"data": Path(options.data).resolve().name, "digest": digest},
        lines,
    )


def _groups(items: Sequence[Item], options: Options) -> dict[str, list[int]]:
    """Which questions a promise of its own is about."""
    if not options.groups:
        return {ALL: list(range(len(items)))}
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        if item.type is None:
            raise Mistake(f'--groups needs a "type" in every row of the data, and line {item.line} has none: add it')
        groups.setdefault(item.type, []).append(index)
    return groups


def _check_sample(sizes: dict[str, int], rule: Rule, options: Options) -> None:
    name, least = min(sizes.items(), key=lambda pair: pair[1])
    if least >= rule.needs:
        return
    whole = f"{least} questions" if name == ALL else f"{least} questions of type {name}"
    sure = "on average" if rule.error is None else f"with {100 * (1 - rule.error):.4g} % confidence each"
    raise Mistake(
        f"{whole} are too few: even if all answers agreed, {rule.needs} are needed for {100 * options.agree:g} % "
        f"agreement {sure}; write more{'' if options.groups else ', raise --count'} or ask for less agreement"
    )
