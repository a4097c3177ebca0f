"""`foveate show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.asking.outputs import check_folder
from foveate.commands.parameters import (
    Attention,
    Device,
    Dtype,
    Fps,
    Guide,
    Keep,
    MaxFrames,
    MaxNewTokens,
    Methods,
    ModelOrOwn,
    OneClip,
    Options,
    Words,
)
from foveate.commands.prepare import load_subject


def show(
    words: Words,
    model: ModelOrOwn = None,
    method: Methods = None,
    keep: Keep = None,
    option: Options = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="results/show-DATE")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: MaxNewTokens = 64,
    attn: Attention = None,
    guide: Guide = None,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    clip: OneClip = False,
) -> None:
    """Draw which tokens every layer and head keeps, how the method ranks them, and where the model looks.

    Writes PNG pictures and show.html, a page with sliders over layers and heads that needs nothing but itself.

    foveate show photo.jpg "What is in the picture?" --method fastv --method plphp --keep 0.4
    """
    check_folder(out or Path("results"))
    subject = load_subject(
        "show",
        words,
        model,
        method,
        keep,
        option,
        guide,
        device,
        dtype,
        attn,
        max_new_tokens,
        fps=fps,
        max_frames=max_frames,
        one_clip=clip,
    )

    from foveate.evaluation.show import show

    show(subject, out=out)
