"""Reads what a command was given about pictures, methods and a model, and loads what it names."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from foveate.asking.asker import Asker
from foveate.asking.hints import hints
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
from foveate.asking.notes import notes
from foveate.asking.options import guide_option, natural_method, typed
from foveate.asking.subject import Subject
from foveate.asking.variant import Variant
from foveate.commands.display import status
from foveate.families import unknown_family
from foveate.methods import grammar
from foveate.methods.grammar import Parts
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


def read_methods(written: Sequence[str] | None) -> list[Parts]:
    """What `--method` says, each time that it is given; none where it is not.

    Raises:
        Mistake: where it is written wrong, or a name or an option is not known.
    """
    found: list[Parts] = []
    for text in written or []:
        try:
            found += grammar.parse_methods(text)
        except ValueError as error:
            raise Mistake(f"--method {text}: {error}") from error
    return found


def read_one(written: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the one method that `--method` says, and its options, those given beside it among them.

    Raises:
        Mistake: as `read_methods`, for several, and for an option that is given twice.
    """
    found = read_methods([written])
    if [len(parts) for parts in found] != [1]:
        raise Mistake(f"--method {written}: one method is wanted here")
    ((part,),) = found
    if twice := sorted(set(options) & set(part.options)):
        raise Mistake(f"{', '.join(twice)}: {part} says it already; give it once")
    return part.name, {**part.options, **options}


def _build(chosen: Sequence[Parts], options: dict[str, Any], guide: str | None) -> list[Variant]:
    """The methods, each with those of the options that it has; an option that none has is a mistake.

    guide: as `guide_option` takes it.
    """
    import foveate

    parts = [part for together in chosen for part in together]
    try:
        own = iter(grammar.shared(parts, options))
        variants = []
        for together in chosen:
            methods, asked = [], []
            for part in together:
                cls, mine = foveate.method_class(part.name), next(own)
                methods.append(foveate.get_method(part.name, **mine, **guide_option(cls, mine, guide)))
                # `keep` belongs to every label, also where it is the default.
                asked.append({**_budget(methods[-1]), **mine})
            variants.append(Variant.asked(methods, asked))
        return variants
    except (ValueError, TypeError, foveate.UnsupportedError) as error:
        raise Mistake(one_line(error)) from error


def _fitting(config: Any, chosen: Sequence[Parts]) -> Sequence[Parts]:
    """The methods asked for, or the family's natural one; checked against the family before weights load."""
    import foveate
    from foveate.engine.support import fitting

    family = foveate.get_family(config)
    if family is None:
        raise Mistake(unknown_family(config.model_type))
    if not chosen:
        return [(grammar.Part(natural_method(fitting(family)), {}),)]
    for name in dict.fromkeys(part.name for parts in chosen for part in parts):
        if foveate.method_class(name).place not in family.places:
            place = PLACES[foveate.method_class(name).place]
            others = {foveate.method_class(fit).place: fit for fit in reversed(fitting(family))}.values()
            raise Mistake(
                f"{name} drops tokens {place}, which {config.model_type} models lack: use "
                f"{', '.join(sorted(others))} or another one that fits (`foveate methods` says where each acts)"
            )
    return chosen


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
    chosen: Sequence[Parts],
    options: dict[str, Any],
    guide: str | None,
    device: str,
    dtype: str,
    attn: str | None,
    *,
    given: Sequence[Method] | None = None,
) -> tuple[Any, Any, list[Variant]]:
    """The model and its processor, and what `_build` makes of the methods asked for, or of the model's own.

    given: methods in place of those.
    """
    hush()
    named = guide or (GLIMPSE if model == GLIMPSE else None)
    if chosen:
        _build(chosen, options, named)  # a wrong name should not wait for the model
    source, dtype = built_in(model, dtype)
    config = read_config(source)
    if given is not None:
        _fitting(config, [(grammar.Part(m.name, {}),) for m in given])
        variants = [Variant.asked([m], [_budget(m)]) for m in given]
    else:
        variants = _build(_fitting(config, chosen), options, named)
    load_guide([m for v in variants for m in v.methods], guide, source, config, device=device, dtype=dtype)
    return *load(source, config, device=device, dtype=dtype, attn=attn), variants


def say_hints(model: str, processor: Any, shown: Sequence[Image | Clip], question: str) -> None:
    """Say on stderr what a built-in model never learned of this."""
    for hint in hints(model, processor, shown, question):
        notes().print(Text(hint, style="dim"), soft_wrap=True)


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
    fps: float | None,
    max_frames: int | None,
    one_clip: bool,
) -> Subject:
    """Read the arguments of a command that looks at a model closely, and load what they name."""
    names, question = split(words, command)
    options = parse_options(keep, option or [])
    check_dtype(dtype, attn)

    shown = open_shown(names, fps, max_frames, one_clip)
    model = model_for(model, shown)
    with status("loading"):
        device = resolve_device(device)
        loaded, processor, variants = load_chosen(model, read_methods(method), options, guide, device, dtype, attn)
        asker = Asker(loaded, processor, shown, question, max_new_tokens)
    say_hints(model, processor, shown, question)
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
