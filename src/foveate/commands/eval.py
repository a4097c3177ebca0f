"""`foveate eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from foveate.asking.loading import GLIMPSE
from foveate.asking.notes import notes
from foveate.commands.parameters import (
    SEEDS,
    Attention,
    BatchSize,
    Data,
    Device,
    Dtype,
    Guide,
    Json,
    Keeps,
    Match,
    MaxFrames,
    MaxNewTokens,
    MethodsOrAll,
    Model,
)


def eval_command(
    model: Model = GLIMPSE,
    methods: MethodsOrAll = None,
    keep: Keeps = "0.5,0.25,0.1",
    data: Data = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="How many questions.", show_default="1008 of glimpse's, all of yours")
    ] = None,
    batch_size: BatchSize = 32,
    max_new_tokens: MaxNewTokens = 64,
    match: Match = "exact",
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="Of random tokens, drawn questions and intervals.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where results go; rows in it are kept.", show_default="results/eval-DATE"),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attention = None,
    guide: Guide = None,
    max_frames: MaxFrames = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that ask at once, each with a model of its own.")] = 1,
    as_json: Json = False,
) -> None:
    """Measure what pruning costs in right answers, by type of question, beside random, uniform and pooling.

    foveate eval --methods fopru,plphp:delta=0.2 --keep 0.5,0.25,0.1
    """
    from foveate.evaluation.evaluate import evaluate, overview
    from foveate.evaluation.workplace import Options

    console = notes()
    options = Options(
        model=model,
        methods=",".join(methods or ["all"]),
        keep=keep,
        data=data,
        count=count,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        match=match,
        seed=seed,
        device=device,
        dtype=dtype,
        attn=attn,
        guide=guide,
        max_frames=max_frames,
    )
    results, lost = evaluate(options, out=out, jobs=jobs, console=console)
    if as_json:
        typer.echo(results.to_json())
    else:
        Console().print(overview(results.rows).rich(), crop=False)
    console.print(Text(results.outcome, style="dim"), soft_wrap=True)
    if lost:
        console.print(Text(f"{len(lost)} rows of the data or of the results are missing: see above"), soft_wrap=True)
        raise typer.Exit(1)
