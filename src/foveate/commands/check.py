"""`foveate check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.asking.loading import DTYPES
from foveate.commands.parameters import (
    Attention,
    Device,
    Fps,
    Guide,
    Keep,
    MaxFrames,
    ModelOrOwn,
    OneClip,
    Options,
    Together,
    Words,
)
from foveate.commands.prepare import load_subject


def check(
    words: Words,
    model: ModelOrOwn = None,
    method: Together = None,
    keep: Keep = None,
    option: Options = None,
    steps: Annotated[int, typer.Option(min=1, help="Tokens to generate and compare.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="results/check-DATE")] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}, auto; half precision proves less.")] = "float32",
    attn: Attention = None,
    guide: Guide = None,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    clip: OneClip = False,
) -> None:
    """Prove on a model of your own that pruning drops tokens and does nothing else.

    The pruned model answers; then the untouched one repeats the answer with the dropped tokens masked. Their logits
    must be equal, and the KV cache as small as reported. The exit status is 0 when they are, 1 when not.

    foveate check photo.jpg "What is in the picture?" --model llava-hf/llava-1.5-7b-hf --method plphp
    """
    subject = load_subject(
        "check",
        words,
        model,
        method,
        keep,
        option,
        guide,
        device,
        dtype,
        attn,
        fps=fps,
        max_frames=max_frames,
        one_clip=clip,
    )

    from foveate.evaluation.check import check

    if not check(subject, steps=steps, out=out):
        raise typer.Exit(1)
