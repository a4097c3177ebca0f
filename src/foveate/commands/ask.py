"""`foveate ask`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveate.asking.asker import RUNS, TIMED_TOKENS, Answer, Asker
from foveate.asking.loading import BUILT_IN, check_dtype, resolve_device
from foveate.asking.mistake import Mistake, one_line
from foveate.asking.notes import notes
from foveate.asking.outputs import check_file
from foveate.commands.display import status
from foveate.commands.parameters import (
    Attention,
    Certificate,
    Device,
    Dtype,
    Fps,
    Guide,
    Json,
    Keep,
    MaxFrames,
    MaxNewTokens,
    Methods,
    ModelOrOwn,
    OneClip,
    Options,
    Words,
)
from foveate.commands.prepare import (
    load_chosen,
    model_for,
    open_shown,
    parse_options,
    read_methods,
    read_promise,
    say_hints,
    split,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from foveate.asking.clips import Clip


def ask(
    words: Words,
    model: ModelOrOwn = None,
    method: Methods = None,
    keep: Keep = None,
    option: Options = None,
    certificate: Certificate = None,
    compare: Annotated[bool, typer.Option("--compare", help="Ask the untouched model too, and measure.")] = False,
    show: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw which tokens stayed.", show_default=False)
    ] = None,
    as_json: Json = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: MaxNewTokens = 64,
    attn: Attention = None,
    guide: Guide = None,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    clip: OneClip = False,
) -> None:
    """Ask a vision-language model about pictures or clips, keeping only part of their tokens.

    A clip is a film, or a folder with its frames.

    foveate ask photo.jpg "What is in the picture?" --method plphp --keep 0.4 --compare

    foveate ask film.mp4 "What happens to the dog?" --method evs --keep 0.4 --max-frames 8
    """
    names, question = split(words)
    _check_output(show, names)
    options = parse_options(keep, option or [])
    check_dtype(dtype, attn)
    chosen = read_methods(method)
    promised, rungs = (None, None) if certificate is None else read_promise(certificate, method, options)
    demand = None if promised is None else promised.get("sure")
    if promised is not None and promised.get("max_new_tokens") != max_new_tokens:
        raise Mistake(
            f"the certificate is of answers of at most {promised.get('max_new_tokens')} tokens: give "
            f"--max-new-tokens {promised.get('max_new_tokens')}"
        )
    if demand is not None and (compare or show is not None):
        raise Mistake("the certificate is of a cascade, which asks several times: leave out --compare and --show")
    shown = open_shown(names, fps, max_frames, clip)
    model = model_for(model, shown)
    with status("loading"):
        device = resolve_device(device)
        loaded, processor, variants = load_chosen(model, chosen, options, guide, device, dtype, attn, given=rungs)
        asker = Asker(loaded, processor, shown, question, max_new_tokens)
    say_hints(model, processor, shown, question)

    with status("answering"):
        if demand is not None:
            answers = [asker.climb(variants, demand)]
        else:
            answers = [asker.ask(variant, record=show is not None) for variant in variants]
        if compare:
            answers.insert(0, asker.ask_untouched(answers[0].images))
    if len(answers) > 1:
        with status("measuring"):
            asker.time(answers)
    if show is not None:
        _draw(shown, processor, answers, show)

    if as_json:
        typer.echo(json.dumps(_as_json(model, guide, device, loaded, names, question, answers), indent=2))
    elif len(answers) > 1:
        _print_table(answers, f"{device}, {str(loaded.dtype).removeprefix('torch.')}")
        if model in BUILT_IN:
            small = f"{model} is too small to get faster: foveate bench --geometry 1b times a larger one"
            notes().print(Text(small, style="dim"), soft_wrap=True)
    else:
        Console().print(Text(answers[0].text), soft_wrap=True)
        Console().print(Text(str(answers[0]), style="dim"), soft_wrap=True)
    if show is not None and not as_json:
        notes().print(Text(f"wrote {show}", style="dim"))


def _check_output(show: Path | None, names: Sequence[str]) -> None:
    if show is None:
        return
    if show.suffix.lower() != ".png":
        raise Mistake(f"--show writes PNG: {show} must end in .png")
    if any(Path(name).resolve() == show.resolve() for name in names):
        raise Mistake(f"--show {show} would overwrite the picture that is asked about: name another file")
    check_file("--show", show)


def _draw(shown: Sequence[Image | Clip], processor: Any, answers: Sequence[Answer], path: Path) -> None:
    from foveate.asking import pictures as drawing
    from foveate.asking.clips import frames_of

    seen = [[drawing.crop_as_seen(f, processor.image_processor) for f in frames_of(one)] for one in shown]
    one = len(seen) == 1 and len(seen[0]) == 1
    # A clip is a strip of small frames.
    height = drawing.HEIGHT if max(map(len, seen)) == 1 else drawing.FRAME
    strips = []
    for answer in answers:
        tokens = sum(n for n, _ in answer.images)
        if answer.report is None:
            drawn = [drawing.draw_kept(picture, height=height) for frames in seen for picture in frames]
            legend = str(answer) if answer.alone else f"untouched: {tokens} of {tokens} image tokens"
        else:
            shares, layers, heads = drawing.kept_shares(answer.report)
            images = answer.report.image_tokens[0]
            parts = zip(seen, images, shares, strict=True)
            framed = [(*part, share) for frames, i, share in parts for part in drawing.by_frame(frames, i.tiles)]
            drawn = [drawing.draw_kept(*part, height=height) for part in framed]
            kept = sum(n for _, n in answer.images)
            legend = f"{answer.label}: {kept} of {tokens} image tokens"
            if any(((share > 0) & (share < 1)).any() for share in shares):
                each = f"{layers} layers x {heads} heads" if heads > 1 else f"{layers} layers"
                legend += f"; the brighter, the more of {each} keep it, outlined where half do"
        strips.append(drawing.strip(drawn, legend))
    try:
        drawing.arrange(strips, across=one).save(path)
    except OSError as error:
        raise Mistake(f"cannot write {path}: {one_line(error)}") from error


def _as_json(
    model: str,
    guide: str | None,
    device: str,
    loaded: Any,
    images: Sequence[str],
    question: str,
    answers: Sequence[Answer],
) -> dict[str, Any]:
    return {
        "model": model,
        "guide": guide,
        "device": device,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "images": list(images),
        "question": question,
        "timing": {"runs": RUNS, "tokens": TIMED_TOKENS} if len(answers) > 1 else None,
        "answers": [answer.to_dict() for answer in answers],
    }


def _print_table(answers: Sequence[Answer], where: str) -> None:
    from foveate.engine.report import human_bytes

    said, cost = Table(box=None, pad_edge=False), Table(box=None, pad_edge=False)
    for table in (said, cost):
        table.add_column(style="bold", no_wrap=True)
    said.add_column("answer")
    for name in ("image tokens", "KV cache", "first token", "per token"):
        cost.add_column(name, justify="right", no_wrap=True)
    for answer in answers:
        kept, tokens = sum(n for _, n in answer.images), sum(n for n, _ in answer.images)
        said.add_row(Text(answer.label), Text(answer.text))
        cost.add_row(
            Text(answer.label),
            f"{kept} of {tokens}",
            human_bytes(answer.kv_bytes),
            "-" if answer.first_token_s is None else f"{1000 * answer.first_token_s:.1f} ms",
            "-" if answer.ms_per_token is None else f"{answer.ms_per_token:.2f} ms",
        )
    note = f"{where}; times: medians of {RUNS} runs in turn, {TIMED_TOKENS} tokens each, after a warm-up"
    console = Console()
    console.print(said, "", cost, Text(note, style="dim"), sep="\n")
    if any(answer.first_token_s is None for answer in answers):
        console.print(Text("-: not timed, as exit_threshold does not stream", style="dim"))
    for answer in answers:
        if answer.alone:
            console.print(Text(str(answer), style="dim"), soft_wrap=True)
