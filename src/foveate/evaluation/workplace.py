"""What `foveate eval` works with: the model, its questions and the variants, as options ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foveate.asking.loading import (
    BUILT_IN,
    GLIMPSE,
    GLIMPSE_CROSS,
    GLIMPSE_VIDEO,
    built_in,
    check_dtype,
    dtype_name,
    hush,
    load,
    load_guide,
    read_config,
    resolve_device,
)
from foveate.asking.mistake import Mistake, one_line
from foveate.asking.options import options_in, parse_keeps, variants
from foveate.asking.outputs import check_file
from foveate.asking.subject import fingerprints, option_files
from foveate.asking.variant import Variant
from foveate.families import get_family, unknown_family
from foveate.methods.places import PLACES

from .accuracy import BASELINES, CLIP_GROUPS, GROUPS, MATCHES
from .questions import FILE, Item, as_items, draw, from_folder, from_glimpse
from .results import Row
from .runner import Batches

COUNT = 1008  # glimpse's questions, as many of each kind: the 95 % intervals are 1 to 3 points to each side


@dataclass(frozen=True)
class Options:
    """What decides the rows, as `foveate eval` takes it."""

    model: str
    methods: str
    keep: str
    data: str | None
    count: int | None
    batch_size: int
    max_new_tokens: int
    match: str
    seed: int
    device: str
    dtype: str
    attn: str | None
    guide: str | None
    max_frames: int | None = None


@dataclass
class Workplace:
    """All that is needed to ask: the model, its inputs, and the variants.

    left_out: a line for each variant that does not fit. lost: number and cause of each row of the data that cannot be
    used. groups: types of questions that are scored together.
    """

    model: Any
    processor: Any
    batches: Batches
    variants: list[Variant]
    max_new_tokens: int
    left_out: list[str]
    lost: list[str]
    groups: dict[str, tuple[str, ...]]


def prepare(options: Options, check: Callable[[Row], object] = lambda settings: None) -> Workplace:
    """Load the model and encode the questions. check: called with the settings of the results, before what takes long.

    Raises:
        Mistake: for what the user got wrong.
    """
    if options.match not in MATCHES:
        raise Mistake(f"--match {options.match} is unknown: use {' or '.join(MATCHES)}")
    check_dtype(options.dtype, options.attn)
    model, data, seed, count = options.model, options.data, options.seed, options.count
    check_data(model, data)
    keeps = parse_keeps(options.keep)
    hush()
    named = options.guide or (GLIMPSE if model == GLIMPSE else None)
    if options.methods != "all":  # a wrong name should not wait for the model
        variants(options.methods, keeps, tuple(PLACES), "", seed=seed, guide=named)
    source, dtype = built_in(model, options.dtype)
    device = resolve_device(options.device)
    config, family = known_family(source)
    chosen, left_out = variants(
        options.methods, keeps, family.places, config.model_type, always=BASELINES, seed=seed, guide=named
    )
    load_guide([m for v in chosen for m in v.methods], options.guide, source, config, device=device, dtype=dtype)

    settings: Row = {"model": model, "dtype": dtype_name(dtype, config), "device": device_name(device)}
    settings |= {"attn": options.attn, "seed": seed, "match": options.match}
    settings |= {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
    if options.guide is not None:
        settings["guide"] = options.guide
    settings |= fingerprints(model, options.guide)
    settings |= option_files(options_in(options.methods))
    bad: list[tuple[int, str]] = []
    if data in (None, GLIMPSE):
        name, ask, groups = own_questions(model, data)
        settings |= {"data": name, "count": count or COUNT}
        items = ask(count or COUNT, 0)
    else:
        assert data is not None
        items, bad, digest = from_folder(data, MATCHES[options.match])
        settings |= {"data": Path(data).resolve().name, "digest": digest, "count": count}
        items, groups = draw(items, count, seed), {}
    if options.max_frames is not None:
        if not any(item.shows_clip for item in items):
            raise Mistake("--max-frames is of clips, and no question is about one: leave it out")
        settings["max_frames"] = options.max_frames
        items = [replace(item, max_frames=options.max_frames) for item in items]
    check(settings)
    loaded, processor = load(source, config, device=device, dtype=dtype, attn=options.attn)
    chosen = list(fitting(loaded, chosen, left_out))

    batches = usable(processor, items, options.batch_size, bad)
    lost = [f"{FILE}, line {line}: {why}" for line, why in sorted(bad)]
    return Workplace(loaded, processor, batches, chosen, options.max_new_tokens, left_out, lost, groups)


def check_data(model: str, data: str | None) -> None:
    """Refuse a model of one's own without questions."""
    if data is None and model not in BUILT_IN:
        raise Mistake(f"--data is missing: a folder with a {FILE}, or {GLIMPSE} for the drawn pictures of glimpse")


def check_out(out: Path) -> None:
    """Refuse a file that cannot be made, before anything is asked."""
    if out.is_file():
        raise Mistake(f"--out {out} is there already: delete it or name another file")
    check_file("--out", out)


def own_questions(
    model: str, data: str | None
) -> tuple[str, Callable[[int, int], list[Item]], dict[str, tuple[str, ...]]]:
    """The held-out questions for a model: their name, so many of them from some number on, and types scored together.

    data: glimpse for those about pictures, None for those that a built-in model learned to answer.
    """
    from foveate import glimpse

    if data is None and model == GLIMPSE_VIDEO:
        name = f"{GLIMPSE} clips {glimpse.CLIPS_VERSION}"
        return name, lambda count, first: as_items(glimpse.heldout_clips(count, first=first)), CLIP_GROUPS
    kinds = glimpse.ONE_PICTURE if model == GLIMPSE_CROSS else glimpse.KINDS
    name = f"{GLIMPSE} {glimpse.HELDOUT_VERSION}"
    return name, lambda count, first: from_glimpse(count, kinds, first), GROUPS


def known_family(source: str) -> tuple[Any, Any]:
    """The configuration of a model folder or hub id, and the family it belongs to."""

    config = read_config(source)
    family = get_family(config)
    if family is None:
        raise Mistake(unknown_family(config.model_type))
    return config, family


def usable(processor: Any, items: Sequence[Item], batch_size: int, bad: list[tuple[int, str]]) -> Batches:
    """The batches of the questions that the processor takes. bad: gets line and cause of each other one."""
    batches = Batches(processor, items, batch_size)
    bad += [(items[index].line or 0, f"the model's processor says: {why}") for index, why in batches.refused.items()]
    if batches.refused:
        items = [item for index, item in enumerate(items) if index not in batches.refused]
        batches = Batches(processor, items, batch_size)
    if not items:
        raise Mistake(f"no question is left: {bad[-1][1]}")
    return batches


def fitting(model: Any, chosen: Sequence[Variant], left_out: list[str]) -> Iterator[Variant]:
    """The variants that this very model takes; one that was named and does not fit is a mistake.

    A model without weights, on the device "meta", takes also those whose own weights are of another.
    """
    import foveate

    for variant in chosen:
        here = model.device.type == "meta"
        methods = [method.untrained() if here else method for method in variant.methods]
        try:
            foveate.prune(model, methods).remove()
        except (foveate.UnsupportedError, ValueError) as error:
            line = f"{variant.label} keep={variant.keep}: {one_line(error)}"
            if variant.named:
                raise Mistake(line) from error
            left_out.append(line)
        else:
            yield variant


def some(lines: Iterable[str], where: str = "", most: int = 10) -> list[str]:
    """Lines about what is left out, the first of many. where: the rest can be read."""
    lines = [f"left out: {line}" for line in lines]
    return lines if len(lines) <= most else [*lines[:most], f"left out: {len(lines) - most} more rows{where}"]


def device_name(device: str) -> str:
    """The device and, where it has one, the name of its model."""
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device
