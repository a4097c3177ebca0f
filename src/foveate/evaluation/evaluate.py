"""`foveate eval`: from what the user wrote to a folder of rows, plots and answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from foveate.asking.loading import GLIMPSE, built_in, check_dtype, hush, load, load_guide, read_config, resolve_device
from foveate.asking.mistake import Mistake, one_line
from foveate.asking.options import Variant, parse_keeps, variants
from foveate.asking.subject import fingerprints
from foveate.methods.places import PLACES

from .accuracy import BASELINES, GROUPS, MATCHES, Answers, measure
from .questions import FILE, draw, from_folder, from_glimpse
from .results import Results, Row, write
from .runner import Batches
from .tables import Table, table

COUNT = 1008  # glimpse's questions, as many of each kind: the 95 % intervals are 1 to 3 points to each side


def evaluate(
    *,
    model: str,
    methods: str,
    keep: str,
    data: str | None,
    count: int | None,
    batch_size: int,
    max_new_tokens: int,
    match: str,
    seed: int,
    out: Path | None,
    device: str,
    dtype: str,
    attn: str | None,
    guide: str | None,
    console: Console,
) -> tuple[Results, list[str]]:
    """Measure, and draw the plots; everything is as `foveate eval` takes it.

    Returns the results, and a line for each row of the data and each variant that could not be used.
    """
    if match not in MATCHES:
        raise Mistake(f"--match {match} is unknown: use {' or '.join(MATCHES)}")
    check_dtype(dtype)
    if data is None and model != GLIMPSE:
        raise Mistake(f"--data is missing: a folder with a data.jsonl, or {GLIMPSE} for the drawn pictures of glimpse")
    keeps = parse_keeps(keep)

    with console.status("loading"):
        hush()
        import foveate
        from foveate import glimpse

        named = guide or (GLIMPSE if model == GLIMPSE else None)
        if methods != "all":  # a wrong name should not wait for the model
            variants(methods, keeps, tuple(PLACES), "", seed=seed, guide=named)
        source, dtype = built_in(dtype) if model == GLIMPSE else (model, dtype)
        device = resolve_device(device)
        config = read_config(source)
        family = foveate.get_family(config.model_type)
        if family is None:
            known = ", ".join(foveate.families())
            raise Mistake(f"{config.model_type} models cannot be pruned; known families: {known}")
        chosen, left_out = variants(
            methods, keeps, family.places, config.model_type, always=BASELINES, seed=seed, guide=named
        )
        load_guide([v.method for v in chosen], guide, source, config, device=device, dtype=dtype)

        settings: Row = {"model": model, "dtype": dtype_name(dtype, config), "device": device_name(device)}
        settings |= {"attn": attn, "seed": seed, "match": match}
        settings |= {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        if guide is not None:
            settings["guide"] = guide
        settings |= fingerprints(model, guide)
        bad: list[tuple[int, str]] = []
        if data in (None, GLIMPSE):
            settings |= {"data": f"{GLIMPSE} {glimpse.HELDOUT_VERSION}", "count": count or COUNT}
            items, groups = from_glimpse(count or COUNT), GROUPS
        else:
            assert data is not None
            items, bad, digest = from_folder(data, MATCHES[match])
            settings |= {"data": Path(data).resolve().name, "digest": digest, "count": count}
            items, groups = draw(items, count, seed), {}
        results = Results(out, "eval", settings, keys=("method", "keep"))
        loaded, processor = load(source, config, device=device, dtype=dtype, attn=attn)
        chosen = list(fitting(loaded, chosen, left_out))

    with console.status("preparing the questions"):
        batches = Batches(processor, items, batch_size)
        bad += [
            (items[index].line or 0, f"the model's processor says: {why}") for index, why in batches.refused.items()
        ]
        if batches.refused:
            items = [item for index, item in enumerate(items) if index not in batches.refused]
            batches = Batches(processor, items, batch_size)
    if not items:
        raise Mistake(f"no question is left: {bad[-1][1]}")
    lost = [f"{FILE}, line {line}: {why}" for line, why in sorted(bad)]
    for line in (*(f"left out: {line}" for line in left_out), *_some(lost)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    from_user = data not in (None, GLIMPSE)
    Answers(results.folder / "answers.csv", items)  # refuses other questions before anything is written
    with results:
        if lost:
            write(results.folder / "bad-rows.txt", "\n".join(lost) + "\n")
        else:
            (results.folder / "bad-rows.txt").unlink(missing_ok=True)  # an earlier run's
        try:
            failures = measure(
                loaded,
                processor,
                batches,
                chosen,
                results,
                groups=groups,
                match=match,
                max_new_tokens=max_new_tokens,
                seed=seed,
                more={"bad_rows": len(lost)} if from_user else None,
                console=console,
            )
            results.complete = not failures
            _draw(results, f"{model}: {len(items):,} questions", groups)
        except KeyboardInterrupt:
            line = f"stopped: {len(results.rows)} finished rows are in {results.folder}; the same command goes on there"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            raise
    return results, lost + failures


def fitting(model: Any, chosen: Sequence[Variant], left_out: list[str]) -> Iterator[Variant]:
    """The variants that this very model takes; one that was named and does not fit is a mistake."""
    import foveate

    for variant in chosen:
        try:
            foveate.prune(model, variant.method).remove()
        except (foveate.UnsupportedError, ValueError) as error:
            line = f"{variant.label} keep={variant.keep}: {one_line(error)}"
            if variant.named:
                raise Mistake(line) from error
            left_out.append(line)
        else:
            yield variant


def _draw(results: Results, title: str, parts: dict[str, Any]) -> None:
    from .plots import curves, pareto

    rows = [row for row in results.rows if row["kept_share"] is not None]  # None: a guide answered all
    for part in ("", *parts):
        y = f"accuracy:{part}" if part else "accuracy"
        if y in rows[0]:
            name = f"{y.replace(':', '-')}.png"
            if results.due(name):
                whole = f"{title}, {part}" if part else title
                curves(rows, results.folder / name, y=y, dashed=BASELINES, title=whole)
    if results.due("pareto.png"):
        pareto(rows, results.folder / "pareto.png", title=title)


def overview(rows: Sequence[Row]) -> Table:
    """Right answers in %, by keep: to all questions, and to those where pruning breaks first."""
    parts = {"accuracy": "all", "accuracy:grounding": "grounding", "accuracy:reading": "reading"}
    columns = [name for name in parts if name in rows[0]]
    whole = table(rows, ["method", *columns], across="keep")
    keeps = (len(whole.head) - 1) // len(columns)
    titles = [parts[columns[i // keeps]] + " %" if i % keeps == 0 else "" for i in range(keeps * len(columns))]
    head = [f"{title}\n{long.rpartition(' ')[2]}" for title, long in zip(titles, whole.head[1:], strict=True)]
    return replace(whole, head=["right answers\nkeep", *head])


def dtype_name(dtype: str, config: Any) -> str:
    """What `auto` will become, as far as the configuration says."""
    own = getattr(config, "dtype", None)
    return str(own).removeprefix("torch.") if dtype == "auto" and own is not None else dtype


def device_name(device: str) -> str:
    """The device and, where it has one, the name of its model."""
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device


def _some(lines: Sequence[str], most: int = 10) -> list[str]:
    shown = [f"left out: {line}" for line in lines[:most]]
    return [*shown, f"left out: {len(lines) - most} more rows, see bad-rows.txt"] if len(lines) > most else shown
