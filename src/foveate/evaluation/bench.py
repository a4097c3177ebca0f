"""`foveate bench`: from what the user wrote to a folder of rows and plots."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from foveate.asking.loading import built_in, check_dtype, dtype_name, hush, load, read_config, resolve_device
from foveate.asking.mistake import Mistake, one_line
from foveate.asking.options import options_in, parse_keeps, variants
from foveate.asking.subject import option_files
from foveate.families import get_family, unknown_family
from foveate.methods.places import PLACES

from . import geometries
from .architectures import GEOMETRIES
from .results import Results, Row
from .speed import KEYS, Bench, run
from .synthetic import synthetic
from .tables import Table, table
from .workplace import device_name, fitting

HEADS = {
    "method": "method",
    "keep": "keep",
    "batch": "batch",
    "ttft_ms": "first\ntoken ms",
    "ttft_vs_untouched": "x un-\ntouched",
    "ttft_gain_share": "ideal\ngain %",
    "decode_ms": "decode\nstep ms",
    "decode_vs_untouched": "x un-\ntouched",
    "decode_gain_share": "ideal\ngain %",
    "kv_share": "KV\n%",
}


def bench(
    *,
    model: str | None,
    geometry: str | None,
    methods: str,
    keep: str,
    batch: str,
    padded: bool,
    image_tokens: int | None,
    frames: int | None,
    new_tokens: int,
    repeat: int,
    seed: int,
    out: Path | None,
    device: str,
    dtype: str,
    attn: str | None,
    console: Console,
) -> tuple[Results, list[str]]:
    """Measure, and draw the plots; everything is as `foveate bench` takes it.

    Returns the results, and a line for each variant that could not be measured.
    """
    if (model is None) == (geometry is None):
        known = ", ".join(GEOMETRIES)
        raise Mistake(f"give either --geometry, for random weights ({known}), or --model, a hub id or a model folder")
    check_dtype(dtype, attn)
    keeps, batches = parse_keeps(keep), _batches(batch)

    if padded and min(batches) < 2:
        raise Mistake("--padded shortens every second sample: give --batch 2 or more")

    with console.status("preparing"):
        hush()

        if methods != "all":  # a wrong name should not wait
            variants(methods, keeps, tuple(PLACES), "", seed=seed)
        device = resolve_device(device)
        if geometry is not None:
            config = geometries.get_config(geometry, image_tokens)
            dtype = "bfloat16" if dtype == "auto" else dtype
        else:
            assert model is not None
            source, dtype = built_in(model, dtype)
            config = read_config(source)
        family = get_family(config)
        if family is None:
            raise Mistake(unknown_family(config.model_type))
        inputs = {
            size: synthetic(config, size, tokens=image_tokens, frames=frames, padded=padded, seed=seed)
            for size in batches
        }
        sketch = _sketch(config, attn)
        chosen, left_out = variants(methods, keeps, family.places, config.model_type, seed=seed)
        chosen = list(fitting(sketch, chosen, left_out))
        if geometry is not None:  # nobody trained a method's weights for random ones
            chosen = [replace(each, methods=tuple(m.untrained() for m in each.methods)) for each in chosen]
        if device == "cpu" and geometry is not None:
            _check_memory(geometry, sketch, dtype)
        settings: Row = {"geometry": geometry, "model": model, "image_tokens": image_tokens, "padded": padded}
        settings |= {"device": device_name(device), "dtype": dtype_name(dtype, config), "attn": attn}
        settings |= {"threads": torch.get_num_threads()}
        settings |= {"new_tokens": new_tokens, "repeat": repeat, "seed": seed}
        settings |= {} if frames is None else {"frames": frames}
        settings |= option_files(options_in(methods))
        results = Results(out, "bench", settings, keys=KEYS)
    for line in left_out:
        console.print(f"left out: {line}", markup=False, highlight=False, soft_wrap=True)

    loaded: Any = None

    def make(size: int) -> Bench:
        nonlocal loaded
        if loaded is None:
            if geometry is not None:
                loaded = geometries.build(config, device=device, dtype=dtype, attn=attn, seed=seed)
            else:
                loaded, _ = load(source, config, device=device, dtype=dtype, attn=attn)
                geometries.endless(loaded)
        on_device = {name: tensor.to(loaded.device) for name, tensor in inputs[size].items()}
        ready = {n: t.to(loaded.dtype) if t.is_floating_point() else t for n, t in on_device.items()}
        clips = frames if "pixel_values" in ready else None
        return Bench(loaded, ready, new_tokens=new_tokens, repeat=repeat, clips=clips)

    with results:
        try:
            failures = run(make, chosen, batches, results, console)
            results.complete = not failures
            for size in sorted({row["batch"] for row in results.rows}):
                _draw(results, size, f"{geometry or model}, batch {size}, {settings['device']}, {settings['dtype']}")
        except KeyboardInterrupt:
            line = f"stopped: {len(results.rows)} finished rows are in {results.folder}; the same command goes on there"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            raise
    return results, failures


def overview(rows: Sequence[Row]) -> Table:
    """The columns that say most."""
    heads = HEADS if len({row["batch"] for row in rows}) > 1 else {n: h for n, h in HEADS.items() if n != "batch"}
    return replace(table(rows, list(heads)), head=list(heads.values()))


def _batches(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise Mistake(f"--batch {text}: write how many samples run together, such as 1 or 1,8")
    return list(dict.fromkeys(sizes))


def _sketch(config: Any, attn: str | None) -> Any:
    """The model without any weights."""
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, attn_implementation=attn)
    except (ImportError, ValueError) as error:
        raise Mistake(f"cannot make this model with --attn {attn}: {one_line(error)}") from error


def _check_memory(name: str, sketch: Any, dtype: str) -> None:
    needed = sum(weight.numel() for weight in sketch.parameters()) * getattr(torch, dtype).itemsize
    if hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > there:
            raise Mistake(
                f"the weights of {name} take {needed / 1e9:.0f} GB in {dtype}, and this machine has "
                f"{there / 1e9:.0f} GB: use a smaller dtype, a GPU, or --geometry 1b"
            )


def _draw(results: Results, batch: int, title: str) -> None:
    from .plots import curves

    rows = [dict(row) for row in results.rows if row["batch"] == batch]
    for name, what in (("ttft", "time to the first token"), ("decode", "time of a decoding step")):
        file = f"{name}-batch-{batch}.png"
        if not results.due(file):
            continue
        for row in rows:
            row[f"{name}_bound"] = row[f"ideal_{name}_ms"] / row[f"untouched_{name}_ms"]
        level: Row = {"place": None, f"{name}_vs_untouched": 1.0}
        curves(
            [level, *rows],
            results.folder / file,
            y=f"{name}_vs_untouched",
            bound=f"{name}_bound",
            ylabel=f"{what}, % of the untouched model's",
            title=f"{title} (dotted: the ideal)",
        )
