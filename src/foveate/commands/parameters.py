"""Arguments and options that several commands have, declared once."""

from pathlib import Path
from typing import Annotated

import typer

from foveate.asking.loading import DTYPES
from foveate.asking.options import DEFAULT
from foveate.commands.completion import complete_methods, complete_models

SEEDS = 2**63 - 1  # the most that torch takes

Words = Annotated[list[str], typer.Argument(metavar="IMAGE|CLIP... QUESTION", show_default=False)]
Model = Annotated[
    str,
    typer.Option(
        help="glimpse, glimpse-cross or glimpse-video (built in), a hub id, or a model folder.",
        autocompletion=complete_models,
    ),
]
ModelOrOwn = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="glimpse, glimpse-cross or glimpse-video (built in), a hub id, or a model folder.",
        show_default="glimpse, of clips glimpse-video",
        autocompletion=complete_models,
    ),
]
Fps = Annotated[float | None, typer.Option(min=0.01, help="Frames of each second of a film.", show_default="2")]
MaxFrames = Annotated[
    int | None, typer.Option(min=1, help="Frames of a clip at most, at an even stride.", show_default="32")
]
OneClip = Annotated[bool, typer.Option("--clip", help="The pictures are the frames of one clip, in their order.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        "--methods",
        "-m",
        metavar="A:OPTION=VALUE+B,...",
        help="See: foveate methods. May be repeated; a+b acts together.",
        show_default=f"{DEFAULT}, or what fits",
        autocompletion=complete_methods,
    ),
]
MethodsOrAll = Annotated[
    list[str] | None,
    typer.Option(
        "--methods",
        "--method",
        "-m",
        metavar="all|A:OPTION=VALUE+B,...",
        help="See: foveate methods. May be repeated; a+b acts together.",
        show_default="all",
        autocompletion=complete_methods,
    ),
]
Keep = Annotated[str | None, typer.Option(help="Fraction of each image's tokens (0.25), or tokens per image (64).")]
Keeps = Annotated[str, typer.Option(metavar="KEEP,...", help="Fractions of each image's tokens, or tokens per image.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="Any other option of the method.")
]
Guide = Annotated[
    str | None,
    typer.Option(help="The smaller model of sgl: a hub id or a folder.", show_default="glimpse's own, if glimpse"),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[str, typer.Option(help=f"auto, {', '.join(DTYPES)}.")]
Attention = Annotated[
    str | None, typer.Option(help="Attention: sdpa, eager, flash_attention_2.", show_default="the model's own")
]
Data = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="Your own questions: FOLDER/data.jsonl.", show_default="glimpse's"),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions answered together.")]
Match = Annotated[str, typer.Option(help="exact: the answer and nothing else; contains: the answer's words in a row.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Certificate = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="What foveate calibrate wrote, in place of a method.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
