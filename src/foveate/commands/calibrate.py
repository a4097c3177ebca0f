"""`foveate calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from foveate.asking.loading import GLIMPSE
from foveate.asking.mistake import Mistake, one_line
from foveate.asking.notes import notes
from foveate.asking.options import parse_grid
from foveate.commands.parameters import (
    SEEDS,
    Attention,
    BatchSize,
    Data,
    Device,
    Dtype,
    Guide,
    MaxNewTokens,
    Model,
)


def calibrate(
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            "--method",
            "-m",
            metavar="A:OPTION=VALUE,B,...",
            help="May be repeated; several share the error.",
            show_default="csp",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="OUT.json", help="Where the certificate goes.", show_default=False)
    ] = None,
    model: Model = GLIMPSE,
    data: Data = None,
    agree: Annotated[float, typer.Option(help="The part of answers that must be the untouched model's.")] = 0.95,
    confidence: Annotated[float, typer.Option(help="How surely.")] = 0.9,
    policy: Annotated[
        str,
        typer.Option(
            help="fixed: one keep for all. mass: of each picture the tokens that hold a share of the method's scores. "
            "cascade: few tokens first, and more where the model is unsure."
        ),
    ] = "fixed",
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="BUDGET,...",
            help="The budgets that are tried, 1.0 among them: keeps, or masses.",
            show_default="1.0,0.75,0.5,0.25,0.1",
        ),
    ] = None,
    loss: Annotated[
        str, typer.Option(help="What a difference is: exact, normalised, f1, or module:function of your own.")
    ] = "exact",
    guarantee: Annotated[
        str, typer.Option(help="confidence; or average: weaker, over many calibrations, from 19 questions on.")
    ] = "confidence",
    groups: Annotated[bool, typer.Option("--groups", help="A promise for each type of question.")] = False,
    count: Annotated[int, typer.Option(min=1, help="How many questions, one a picture.")] = 300,
    temperature: Annotated[float, typer.Option(help="0: answers are greedy, and nothing else has a promise.")] = 0.0,
    monitor: Annotated[
        Path | None,
        typer.Option(
            metavar="CERTIFICATE",
            help="Watch whether it still holds: --data takes new questions, or a .jsonl file of answers.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw agreement over kept tokens.", show_default=False)
    ] = None,
    batch_size: BatchSize = 32,
    max_new_tokens: MaxNewTokens = 64,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="Of drawn questions and random tokens.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attention = None,
    guide: Guide = None,
) -> None:
    """Find how few image tokens give the untouched model's answers, on questions of yours, with a stated confidence.

    foveate calibrate --methods csp --agree 0.95 --confidence 0.9 --out certificate.json
    """
    from foveate.evaluation import calibrate as calibrating
    from foveate.evaluation.calibrate_report import draw

    if temperature != 0:
        raise Mistake(
            f"--temperature {temperature:g} samples, and two sampled answers differ by themselves: calibrate greedy "
            "answers (0), which is all that a certificate is about"
        )
    console = notes()
    options = calibrating.Options(
        model=model,
        methods=",".join(methods or ["csp"]),
        policy=policy,
        data=data,
        agree=agree,
        confidence=confidence,
        guarantee=guarantee,
        loss=loss,
        grid=None if grid is None else parse_grid(grid, "1.0,0.5,0.25"),
        groups=groups,
        count=count,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        seed=seed,
        device=device,
        dtype=dtype,
        attn=attn,
        guide=guide,
    )
    shown = Console()
    if monitor is not None:
        from foveate.evaluation.monitor import watch

        seen = watch(monitor, options, console)
        for line in seen.sentences():
            shown.print(Text(line), soft_wrap=True)
        raise typer.Exit(1 if seen.alarm else 0)
    if out is None:
        raise Mistake("--out is missing: name the file that the certificate goes to")
    if plot is not None and (plot.suffix.lower() != ".png" or not plot.absolute().parent.is_dir()):
        raise Mistake(f"--plot {plot}: name a .png in a folder that is there")
    certificate = calibrating.calibrate(options, out, console)
    shown.print(certificate.table().rich(), "", sep="\n", crop=False)
    for line in (*certificate.sentences(), f"wrote {out}", f"foveate ask PICTURE QUESTION --certificate {out}"):
        shown.print(Text(line), soft_wrap=True)
    if plot is not None:
        try:
            draw(certificate.to_dict(), plot)
        except OSError as error:
            raise Mistake(f"cannot write {plot}: {one_line(error)}") from error
