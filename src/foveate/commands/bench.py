"""`foveate bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from foveate.asking.loading import DTYPES
from foveate.asking.notes import notes
from foveate.commands.parameters import SEEDS, Attention, Device, Json, Keeps, MethodsOrAll


def bench(
    geometry: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Random weights of a real size: 1b, gemma3-1b, qwen3-vl-1b, qwen3-vl-2b, smolvlm2-2.2b, "
            "qwen2.5-vl-3b, qwen2.5-vl-7b, qwen3-vl-8b, internvl3.5-8b, llava-1.5-7b, llava-next-7b, "
            "llava-next-mistral-7b, llava-onevision-7b, llama-3.2-11b-vision, gemma3-12b.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Or real weights: a hub id, a model folder, or glimpse.", show_default=False)
    ] = None,
    methods: MethodsOrAll = None,
    keep: Keeps = "0.25",
    batch: Annotated[str, typer.Option(metavar="SIZE,...", help="How many samples run together.")] = "1",
    padded: Annotated[bool, typer.Option("--padded", help="Shorten every second sample, padded on the left.")] = False,
    image_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the picture, or of each frame.", show_default="the architecture's own"),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="A clip of so many frames in place of a picture.", show_default=False)
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded in every run.")] = 32,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each variant; medians are shown.")] = 5,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="Of random weights, inputs and tokens.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Where results go; rows in it are kept.", show_default="results/bench-DATE"
        ),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help=f"auto, {', '.join(DTYPES)}; auto: bfloat16, and what --model was saved in.")
    ] = "auto",
    attn: Attention = None,
    as_json: Json = False,
) -> None:
    """Measure what pruning saves in time and memory, beside the untouched model and the best that is possible.

    foveate bench --geometry 1b --methods fopru,fastv,plphp --keep 0.5,0.25
    """
    from foveate.evaluation.bench import bench, overview

    console = notes()
    results, lost = bench(
        model=model,
        geometry=geometry,
        methods=",".join(methods or ["all"]),
        keep=keep,
        batch=batch,
        padded=padded,
        image_tokens=image_tokens,
        frames=frames,
        new_tokens=new_tokens,
        repeat=repeat,
        seed=seed,
        out=out,
        device=device,
        dtype=dtype,
        attn=attn,
        console=console,
    )
    if as_json:
        typer.echo(results.to_json())
    elif results.rows:
        Console().print(overview(results.rows).rich(), crop=False)
    console.print(Text(results.outcome, style="dim"), soft_wrap=True)
    if lost:
        for line in lost:
            console.print(Text(f"not measured: {line}"), soft_wrap=True)
        raise typer.Exit(1)
