"""Reads what a command was given about pictures, methods and a model, and loads what it names."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.asking.asker import Asker
from foveate.asking.loading import (
    GLIMPSE,
    GLIMPSE_VIDEO,
    built_in,
    check_dtype,
    hush,
    load,
    load_guide,
    read_config,
    resolve_device,
)
from foveate.asking.mistake import Mistake, one_line
from foveate.asking.options import guide_option, natural_method, typed
from foveate.asking.subject import Subject, Variant
from foveate.commands.display import status
from foveate.families import unknown_family
from foveate.methods.places import PLACES

if TYPE_CHECKING:
    from PIL.Image import Image

    from foveate.asking.clips import Clip
    from foveate.methods.base import Method


def split(words: Sequence[str], command: str = "ask") -> tuple[Sequence[str], str]:
    """Images (or clips) and question; the question comes last."""
    from foveate.asking.clips import FILMS, PICTURES

    *images, question = words
    looks_like_file = Path(question).suffix.lower() in PICTURES | FILMS and len(question.split()) == 1
    with contextlib.suppress(OSError):  # too long for a file name: a question
        looks_like_file = looks_like_file or Path(question).exists()
    if looks_like_file and question.strip():
        raise Mistake(
            f'no question: the last argument is {question}; write: foveate {command} {question} "What is this?"'
        )
    if not images:
        raise Mistake(f'no image: write the picture before the question: foveate {command} photo.jpg "{question}"')
    if not question.strip():
        raise Mistake('the question is empty: write one after the image, such as "What is in the picture?"')
    return images, question


def open_shown(names: Sequence[str], fps: float | None, max_frames: int | None, one_clip: bool) -> list[Image | Clip]:
    """The pictures and clips of these names. one_clip: whether the pictures are the frames of one clip."""
    from foveate.asking.clips import FPS, MAX_FRAMES, Clip, is_clip, open_clip
    from foveate.asking.pictures import open_picture

    films = [name for name in names if is_clip(name)]
    if not films and not one_clip and (fps, max_frames) != (None, None):
        raise Mistake("--fps and --max-frames are of clips: give a film or a folder of frames, or leave them out")
    if films and one_clip:
        raise Mistake(f"--clip makes one clip of several pictures, and {films[0]} is one itself: leave it out")
    limits = FPS if fps is None else fps, MAX_FRAMES if max_frames is None else max_frames
    shown = [open_clip(name, *limits) if is_clip(name) else open_picture(name) for name in names]
    return [Clip.of(shown, limits[1])] if one_clip else shown


def model_for(model: str | None, shown: Sequence[Image | Clip]) -> str:
    """The model that was asked for, or the built-in one that sees what is shown."""
    from foveate.asking.clips import Clip

    own = GLIMPSE_VIDEO if any(isinstance(one, Clip) for one in shown) else GLIMPSE
    return own if model is None else model


def parse_options(keep: str | None, pairs: Sequence[str]) -> dict[str, Any]:
    """The options of methods, `keep` among them, as `--keep` and `-o name=value` write them."""
    options: dict[str, Any] = {}
    if keep is not None:
        options["keep"] = typed(keep)
        if not isinstance(options["keep"], (int, float)) or isinstance(options["keep"], bool):
            raise Mistake(f"--keep {keep} is no number: give a fraction (0.25) or tokens per image (64)")
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise Mistake(f"-o {pair}: write name=value, such as -o strategy=row")
        if name in options:
            raise Mistake(f"{name} is given twice: give it once, by --keep or -o")
        options[name] = typed(value.strip())
    return options


def _build(names: Sequence[str], options: dict[str, Any], guide: str | None) -> list[tuple[Method, dict[str, Any]]]:
    """The methods, each with those of the options that it has; an option that none has is a mistake.

    guide: as `guide_option` takes it.
    """
    import foveate

    try:
        classes = [foveate.method_class(name) for name in dict.fromkeys(names)]
        fields = [[f.name for f in dataclasses.fields(cls)] for cls in classes]
        for option in options:
            if not any(option in own for own in fields):
                known = "; ".join(f"{c.name} has {', '.join(own)}" for c, own in zip(classes, fields, strict=True))
                raise Mistake(f"no option {option!r}: {known}")
        own_options = [{name: options[name] for name in options if name in own} for own in fields]
        built = [
            foveate.get_method(c.name, **own, **guide_option(c, own, guide))
            for c, own in zip(classes, own_options, strict=True)
        ]
    except (ValueError, TypeError) as error:
        raise Mistake(one_line(error)) from error
    # `keep` belongs to every label, also where it is the default.
    return [(m, {"keep": m.keep, **own}) for m, own in zip(built, own_options, strict=True)]


def _fitting(config: Any, names: Sequence[str] | None) -> Sequence[str]:
    """The methods asked for, or the family's natural one; checked against the family before weights load."""
    import foveate
    from foveate.engine.support import fitting

    family = foveate.get_family(config)
    if family is None:
        raise Mistake(unknown_family(config.model_type))
    fits = fitting(family)
    if not names:
        return [natural_method(fits)]
    for name in names:
        if foveate.method_class(name).place not in family.places:
            place = PLACES[foveate.method_class(name).place]
            others = {foveate.method_class(fit).place: fit for fit in reversed(fits)}.values()
            raise Mistake(
                f"{name} drops tokens {place}, which {config.model_type} models lack: use "
                f"{', '.join(sorted(others))} or another one that fits (`foveate methods` says where each acts)"
            )
    return names


def _budget(method: Method) -> dict[str, Any]:
    """What of a method says how much it keeps."""
    written = method.to_dict()
    return {"mass": written["mass"]} if "mass" in written else {"keep": method.keep}


def read_promise(
    path: Path, names: Sequence[str] | None, options: dict[str, Any]
) -> tuple[dict[str, Any], list[Method]]:
    """What a certificate says, and the methods it asks with. names, options: given beside it, which must be none."""
    from foveate.engine.certified import rungs_of
    from foveate.methods.method import read_certificate

    if names or options:
        raise Mistake("--certificate says what runs and how much it keeps: leave out --method, --keep and -o")
    try:
        rungs = rungs_of(path)
    except (OSError, ValueError) as error:
        raise Mistake(f"--certificate {path}: {one_line(error)}") from error
    return read_certificate(path) or {}, rungs


def load_chosen(
    model: str,
    names: Sequence[str] | None,
    options: dict[str, Any],
    guide: str | None,
    device: str,
    dtype: str,
    attn: str | None,
    *,
    given: Sequence[Method] | None = None,
) -> tuple[Any, Any, list[tuple[Method, dict[str, Any]]]]:
    """The model and its processor, and what `_build` makes of the methods asked for, or of the model's own.

    given: methods in place of those.
    """
    hush()
    named = guide or (GLIMPSE if model == GLIMPSE else None)
    if names:
        _build(names, options, named)  # a wrong name should not wait for the model
    source, dtype = built_in(model, dtype)
    config = read_config(source)
    if given is not None:
        _fitting(config, [m.name for m in given])
        methods = [(m, _budget(m)) for m in given]
    else:
        methods = _build(_fitting(config, names), options, named)
    load_guide([m for m, _ in methods], guide, source, config, device=device, dtype=dtype)
    return *load(source, config, device=device, dtype=dtype, attn=attn), methods


def load_subject(
    command: str,
    words: Sequence[str],
    model: str | None,
    method: Sequence[str] | None,
    keep: str | None,
    option: Sequence[str] | None,
    guide: str | None,
    device: str,
    dtype: str,
    attn: str | None,
    max_new_tokens: int = 64,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    one_clip: bool = False,
) -> Subject:
    """Read the arguments of a command that looks at a model closely, and load what they name."""
    names, question = split(words, command)
    options = parse_options(keep, option or [])
    check_dtype(dtype)

    shown = open_shown(names, fps, max_frames, one_clip)
    model = model_for(model, shown)
    together = [[name.strip() for name in part.split("+")] for part in method or []]
    with status("loading", quiet=False):
        device = resolve_device(device)
        named = [name for part in together for name in part]
        loaded, processor, methods = load_chosen(model, named, options, guide, device, dtype, attn)
        built = {m.name: (m, own) for m, own in methods}
        variants = [Variant(*zip(*(built[name] for name in part), strict=True)) for part in together or [list(built)]]
        asker = Asker(loaded, processor, shown, question, max_new_tokens)
    settings = {
        "model": model,
        "images": list(names),
        "question": question,
        "device": device,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "attn": loaded.config._attn_implementation,
    }
    if guide is not None:
        settings["guide"] = guide
    if asker.clips:
        settings["clips"] = asker.clips
    return Subject(loaded, processor, asker, shown, variants, settings)
