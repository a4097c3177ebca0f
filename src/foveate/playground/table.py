"""What a page asks: models on the table, the methods that fit each, and one visitor at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import foveate
from foveate.asking.asker import Answer, Asker
from foveate.asking.clips import MAX_FRAMES, Clip, frames_of, is_clip, open_clip
from foveate.asking.loading import BUILT_IN, GLIMPSE, built_in, hush, load, load_guide, read_config, resolve_device
from foveate.asking.mistake import Mistake, one_line
from foveate.asking.options import guide_option, natural_method, variants
from foveate.asking.pictures import HEIGHT, crop_as_seen, open_picture, scaled
from foveate.asking.variant import Variant
from foveate.engine.support import find_target, fitting
from foveate.errors import UnsupportedError
from foveate.evaluation.maps import View, views
from foveate.evaluation.show import Layer, layers_of
from foveate.families import unknown_family
from foveate.methods.base import GuidedMethod, Method

if TYPE_CHECKING:
    from PIL.Image import Image

FRAME = 220  # pixels of the height of each of several pictures
MOST_METHODS = 3  # beside each other
MOST_TOKENS = 256  # of an answer
MOST_PIXELS = 89_000_000  # of all pictures together: as many as the command line takes in one
LONGEST_QUESTION = 2000  # characters
USUAL_KEEP = 0.25  # of methods that count tokens, or find by themselves what they keep


@dataclass(frozen=True)
class Offer:
    """A method that fits a model. keep: what it keeps where nobody says."""

    name: str
    summary: str
    keep: float


@dataclass(frozen=True)
class Loaded:
    """A model that can be asked. usual: the method to begin with. threads: what it computes fastest on."""

    name: str
    source: str
    model: Any
    processor: Any
    offers: dict[str, Offer]
    usual: str
    threads: int


@dataclass(frozen=True)
class Request:
    """What a visitor asks. files: pictures and films. one_clip: whether the pictures are the frames of one clip."""

    files: Sequence[str]
    question: str
    model: str
    methods: Sequence[str]
    keep: float
    one_clip: bool = False
    max_new_tokens: int = 64
    measure: bool = True


@dataclass(frozen=True)
class Comparison:
    """Answers to one question, the untouched model's first, and what there is to draw of the others."""

    answers: Sequence[Answer]
    read_in_a_step: dict[str, float]
    shown: Sequence[View]
    layers: dict[str, list[Layer]]


class Table:
    """Models that visitors share. Pruning hooks the model itself, so one lock lets one visitor at a time ask."""

    def __init__(self, model: str | None = None, device: str = "auto", dtype: str = "auto") -> None:
        self.device, self.dtype = resolve_device(device), dtype
        self.threads = torch.get_num_threads()
        own = [] if model is None or model in BUILT_IN else [model]
        self.names = [*own, *BUILT_IN]
        self.usual = model or GLIMPSE
        self._loaded: dict[str, Loaded] = {}
        self._lock = threading.Lock()
        hush()
        self.loaded(self.usual)  # what cannot be loaded should be said before there is a page

    def loaded(self, name: str) -> Loaded:
        """The model of this name, which is loaded where it is not yet."""
        if name not in self.names:  # a visitor must not make this machine fetch anything
            raise Mistake(f"{name} is not on this table: choose one of {', '.join(self.names)}")
        if name in self._loaded:  # nobody has to wait for somebody else's answer
            return self._loaded[name]
        with self._lock:
            return self._get(name)

    def ask(self, request: Request) -> Comparison:
        """Every answer, its costs, and what was kept."""
        if not request.question.strip():
            raise Mistake('the question is empty: write one, such as "What is in the picture?"')
        if len(request.question) > LONGEST_QUESTION:
            raise Mistake(f"the question has more than {LONGEST_QUESTION} characters: ask in fewer")
        if not 1 <= request.max_new_tokens <= MOST_TOKENS:
            raise Mistake(f"an answer may have 1 to {MOST_TOKENS} tokens")
        shown = open_files(request.files, request.one_clip)
        loaded = self.loaded(request.model)
        with self._lock:
            # The built-in models want one thread, and others want all; torch keeps the number by thread.
            torch.set_num_threads(loaded.threads)
            return self._ask(loaded, request, shown)

    def _get(self, name: str) -> Loaded:
        if name not in self._loaded:
            source, dtype = built_in(name, self.dtype)
            threads = torch.get_num_threads() if name in BUILT_IN else self.threads
            config = read_config(source)
            family = foveate.get_family(config)
            if family is None:
                raise Mistake(unknown_family(config.model_type))
            model, processor = load(source, config, device=self.device, dtype=dtype, attn=None)
            try:
                find_target(model)
            except UnsupportedError as error:
                raise Mistake(one_line(error)) from error
            built, _ = variants("all", [USUAL_KEEP], family.places, config.model_type, guide=_guide(name))
            fits = {v.label: type(v.method) for v in built if v.label in fitting(family) and _installs(model, v.method)}
            if not fits:
                raise Mistake(f"no method fits {name}: see foveate families")
            offers = {fit: Offer(fit, cls.summary.replace("`", ""), _usual_keep(cls)) for fit, cls in fits.items()}
            loaded = Loaded(name, source, model, processor, offers, natural_method(list(offers)), threads)
            self._loaded[name] = loaded
        return self._loaded[name]

    def _ask(self, loaded: Loaded, request: Request, shown: Sequence[Image | Clip]) -> Comparison:
        methods = [self._method(loaded, name, request.keep) for name in check_methods(loaded, request.methods)]
        asker = Asker(loaded.model, loaded.processor, shown, request.question, request.max_new_tokens)
        answers = [asker.ask(Variant.asked([method], [{"keep": request.keep}]), record=True) for method in methods]
        reports = {answer.label: answer.report for answer in answers}
        answers.insert(0, asker.ask_untouched(answers[0].images))
        if request.measure:
            asker.time(answers)
        crop = loaded.processor.image_processor
        seen = [[crop_as_seen(frame, crop) for frame in frames_of(one)] for one in shown]
        height = HEIGHT if sum(map(len, seen)) == 1 else FRAME
        pictures = [[scaled(frame, height) for frame in frames] for frames in seen]
        tiles = [image.tiles for image in next(iter(reports.values())).image_tokens[0]]
        steps = {label: report.decoding.share for label, report in reports.items() if report.decoding is not None}
        layers = {label: layers_of(report) for label, report in reports.items()}
        for answer in answers:
            answer.report = None  # it holds masks on the device
        return Comparison(answers, steps, views(pictures, tiles), layers)

    def _method(self, loaded: Loaded, name: str, keep: float) -> Any:
        guide = _guide(loaded.name)
        try:
            method = foveate.get_method(name, keep=keep, **guide_option(foveate.method_class(name), {}, guide))
        except (ValueError, TypeError) as error:
            raise Mistake(f"{name}: {one_line(error)}") from error
        model = loaded.model
        load_guide([method], None, loaded.source, model.config, device=self.device, dtype=str(model.dtype)[6:])
        return method


def check_methods(loaded: Loaded, names: Sequence[str]) -> Sequence[str]:
    """The names, each once, if they are few enough and fit."""
    if not names:
        raise Mistake("no method: choose at least one")
    if len(names) > MOST_METHODS:
        raise Mistake(f"at most {MOST_METHODS} methods stand beside each other: take some away")
    for name in names:
        if name not in loaded.offers:
            raise Mistake(f"{name} does not fit {loaded.name}: choose another method")
    return list(dict.fromkeys(names))


def open_files(files: Sequence[str], one_clip: bool) -> list[Image | Clip]:
    """Pictures and clips, within the limits of the command line; a mistake is told without the folder of uploads."""
    if not files:
        raise Mistake("no picture: drop one, or take an example")
    if len(files) > MAX_FRAMES:
        raise Mistake(f"{len(files)} files are more than {MAX_FRAMES}: take some away")
    shown: list[Image | Clip] = []
    pixels = 0
    for file in files:
        try:
            one = open_clip(file) if is_clip(file) else open_picture(file)
        except Mistake as error:
            raise Mistake(str(error).replace(file, Path(file).name)) from error
        shown.append(one)
        if not isinstance(one, Clip):
            pixels += one.width * one.height
            if pixels > MOST_PIXELS:
                raise Mistake(f"the pictures have more than {MOST_PIXELS // 10**6} million pixels: make them smaller")
    return [Clip.of(shown, MAX_FRAMES)] if one_clip else shown


def _installs(model: Any, method: Method) -> bool:
    """Whether a method takes this model; some have weights for a few only."""
    if isinstance(method, GuidedMethod):
        return True  # its guide is loaded when it is asked for
    try:
        foveate.prune(model, method).remove()
    except (UnsupportedError, ValueError):
        return False
    return True


def _guide(name: str) -> str | None:
    """The built-in model has a smaller one of its own, for methods in which one guides the other."""
    return GLIMPSE if name == GLIMPSE else None


def _usual_keep(cls: type[Any]) -> float:
    keep = cls.__dataclass_fields__["keep"].default
    return keep if isinstance(keep, float) else USUAL_KEEP
