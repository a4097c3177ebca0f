"""`foveate search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from foveate.asking.loading import GLIMPSE
from foveate.asking.notes import notes
from foveate.asking.options import parse_grid
from foveate.commands.parameters import (
    SEEDS,
    Attention,
    BatchSize,
    Data,
    Device,
    Dtype,
    Match,
    MaxNewTokens,
    Model,
    Options,
)
from foveate.commands.prepare import parse_options, read_one

if TYPE_CHECKING:
    from foveate.evaluation.search_report import Found


def search(
    out: Annotated[Path, typer.Option(metavar="OUT.json", help="Where the schedule goes.", show_default=False)],
    method: Annotated[str, typer.Option("--method", "-m", help="gsearch or psigmoid.")] = "gsearch",
    model: Model = GLIMPSE,
    data: Data = None,
    tolerance: Annotated[float, typer.Option(help="What may be lost: a part of all answers.")] = 0.01,
    score: Annotated[
        str, typer.Option(help="accuracy: right answers; agreement: the untouched model's, for data without answers.")
    ] = "accuracy",
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="RATE,...",
            help="gsearch: the rates a layer may have. psigmoid: the means that are tried.",
            show_default="4 to 132 of 144; 0.05, 0.1, ...",
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="How many questions to search with.")] = 304,
    test: Annotated[int, typer.Option(help="How many others to test the schedule with.")] = 512,
    option: Options = None,
    batch_size: BatchSize = 32,
    max_new_tokens: MaxNewTokens = 64,
    match: Match = "exact",
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="Of drawn questions, curves and intervals.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attention = None,
) -> None:
    """Find how few image tokens every layer can do with, on questions of yours, and test that on others.

    foveate search --method gsearch --tolerance 0.01 --out schedule.json
    """
    from foveate.evaluation import search as searching

    console = notes()
    name, own = read_one(method, parse_options(None, option or []))
    options = searching.Options(
        model=model,
        method=name,
        data=data,
        tolerance=tolerance,
        score=score,
        options=own,
        grid=None if grid is None else parse_grid(grid, "0.25,0.5,0.75"),
        count=count,
        test=test,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        match=match,
        seed=seed,
        device=device,
        dtype=dtype,
        attn=attn,
    )
    found = searching.search(options, out, console)
    shown = Console()
    shown.print(found.scores().rich(), "", found.layers().rich(), "", sep="\n", crop=False)
    for line in (*found.sentences(), *_ways(found, out)):
        shown.print(Text(line), soft_wrap=True)


def _ways(found: Found, out: Path) -> list[str]:
    name = found.method.name
    return [
        f"wrote {out}",
        f"foveate ask PICTURE QUESTION --method {name} -o schedule={out}",
        f"foveate eval --methods {name}:schedule={out} --keep {found.method.keep}",
    ]
