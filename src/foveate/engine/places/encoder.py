"""Between vision encoder and LLM: what an encoder method reads, and what it keeps."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError
from ...families.base import Family
from ...layout import ImageLayout
from ...methods.attention import read_attention
from ...methods.base import EncoderMethod, Method
from ...methods.selection import select_tokens
from ...methods.tokens import ATTENTION
from ..cache import active
from ..devices import on
from ..fixtures import Fixtures
from ..forward import Forward
from ..images import EncodedImage, attach, by_image, refilled
from ..prompts import Prompts
from ..question import Questions
from ..report import Outcome
from ..scores import of_images
from ..target import Target
from ..upstream import untraced
from .place import Action, Place


@dataclass
class _Reading:
    """What one run of the encoder showed: per watched layer its named parts, one a call; and the projector's input.

    images: how many there are. levels: patches behind encoder layers, by layer. readers: the method's own tokens, as
    far as they got; shape: of what they went beside, pictures and tokens; read: keys and values of the layer at hand.
    """

    layers: list[dict[str, list[Tensor]]] = field(default_factory=list)
    images: int = 0
    states: Tensor | None = None
    levels: dict[int, list[Tensor]] = field(default_factory=dict)
    readers: Tensor | None = None
    shape: tuple[int, int] = (0, 0)
    read: dict[int, Tensor] = field(default_factory=dict)


class _Current(threading.local):
    reading: _Reading | None = None


class EncoderPlace(Place):
    """The vision encoder; there even without a method, since other places ask where the tokens of an image lie."""

    def __init__(self, target: Target, method: EncoderMethod | None, outcome: Outcome) -> None:
        super().__init__(target, outcome)
        self.family, self.base, self.method = target.family, target.base, method
        self.reads = method.reads if method is not None else frozenset()
        # Of each encoder the attention modules that are read; one may see images and videos.
        self._encoders = list(dict.fromkeys(self.family.seeing(medium) for medium in target.token_ids))
        self._modules: list[list[nn.Module]] = []
        if method is not None and self.reads & ATTENTION:
            self._modules = [own.vision_attentions(self.base)[-method.vision_layers :] for own in self._encoders]
        self._current = _Current()
        self._prompts = Prompts(target)
        self._questions: Questions | None = None
        if method is not None and self.reads & {"question", "words"}:
            self._questions = Questions(target, self._prompts, method.name)

    @classmethod
    def check(cls, target: Target, methods: Sequence[Method]) -> None:
        for method in methods:
            carries = type(target.family).keys_and_values is not Family.keys_and_values
            if isinstance(method, EncoderMethod) and "readers" in method.reads and not carries:
                raise UnsupportedError(
                    f"{method.name} sends tokens of its own through the vision encoder beside the patches, and that of "
                    f"{target.family.model_type} models has no place for them: use a method that chooses among patches"
                )

    @classmethod
    def of(cls, target: Target, methods: Sequence[Method], outcome: Outcome) -> Place | None:
        if "encoder" not in target.family.places:
            return None
        return cls(target, next((m for m in methods if isinstance(m, EncoderMethod)), None), outcome)

    def install(self, fixtures: Fixtures) -> None:
        for medium in self.target.token_ids:
            fixtures.wrap(self.base, f"get_{medium}_features", functools.partial(self.encode, medium))
        projector = self.family.projector(self.base) if "states" in self.reads else None
        if projector is not None:
            fixtures.hook(projector.register_forward_pre_hook(self._note_states))
        fixtures.route({m: functools.partial(self._attend, i) for own in self._modules for i, m in enumerate(own)})
        if self._questions is not None or self.family.needs_prompt or self.family.frames_apart:
            self._prompts.install(fixtures)
        if self.method is not None and self.reads & {"levels", "readers"}:
            for layers in (own.encoder_layers(self.base) for own in self._encoders):
                for number in self.method.levels(len(layers)) if "levels" in self.reads else ():
                    note = functools.partial(self._note_level, number)
                    fixtures.hook(layers[number - 1].register_forward_hook(note))
                for layer in layers if "readers" in self.reads else ():
                    for which, module in enumerate(self.family.keys_and_values(layer) or ()):
                        fixtures.hook(module.register_forward_hook(functools.partial(self._note_read, which)))
                    fixtures.hook(layer.register_forward_hook(self._carry))

    @property
    def reads_prompt(self) -> bool:
        return self._questions is not None

    def act(self, forward: Forward) -> Action | None:
        return EncoderAction(self, forward) if forward.brings_images else None

    def encode(self, medium: str, encode: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's `get_image_features` or `get_video_features`."""
        if self._current.reading is not None:  # some encode a video as images
            return encode(*args, **kwargs)
        as_tuple = kwargs.get("return_dict") is False
        kwargs = {**kwargs, "return_dict": True}
        inputs = inspect.signature(encode).bind(*args, **kwargs).arguments
        inputs = {**self.target.said, **inputs.pop("kwargs", {}), **inputs}
        if self.family.needs_prompt:
            inputs["input_ids"] = self._prompt()
        pictures = self.target.layouts(medium, inputs)
        layouts = self.target.joined(medium, pictures, self._prompt)
        watched = self._modules[0] if self._modules else []
        self._current.reading = reading = _Reading([{} for _ in watched], len(pictures))
        try:
            output = encode(*args, **kwargs)
        finally:
            self._current.reading = None
        name = self.family.features
        features = by_image(getattr(output, name), layouts, self.family.model_type)
        keeps: list[Tensor | None] = [None] * len(layouts)
        scores: list[Tensor | None] = [None] * len(layouts)
        if self.method is not None:
            if any(tile.patches.ndim > 1 for layout in pictures for tile in layout.tiles):
                reading.states = None  # several patches join into a token, and nothing leads from states to features
            device = features[0].device
            reading = on(device, reading)
            patches = self._patches(reading)
            seen = features
            if self.method.only_drops and self.reads & {"features", "states"}:
                seen = [self.family.as_seen(self.base, each) for each in features]
            chosen = select_tokens(
                self.method,
                layouts,
                seen,
                patches,
                self._project if "states" in patches else lambda states: states,
                images=self._asked(layouts, medium),
                pictures={} if reading.readers is None else {"readers": reading.readers},
                picture=None if reading.readers is None else self._pictures(reading.shape, device),
                scored=self.outcome.records,
            )
            merged = [each.features for each in chosen]
            keeps, scores = [each.stays for each in chosen], [each.scores for each in chosen]
            if any(new is not old for new, old in zip(merged, seen, strict=True)):
                setattr(output, name, refilled(getattr(output, name), merged))
        found = zip(layouts, keeps, scores, strict=True)
        images = [EncodedImage(layout, keep, self.target.session, scored) for layout, keep, scored in found]
        attach(output, name, images)
        forward = active.forward
        if forward is not None and forward.target.base is self.base:
            forward.encoded[medium] = images
        return output.to_tuple() if as_tuple else output

    def _asked(self, layouts: Sequence[ImageLayout], medium: str) -> dict[str, Tensor]:
        """What the method reads of each image's question, by name: (images, ...)."""
        asked: dict[str, Tensor] = {}
        if self._questions is not None and "question" in self.reads:
            asked["question"] = self._questions.states(layouts, medium)
        if self._questions is not None and "words" in self.reads:
            asked["words"], asked["behind"] = self._questions.words(layouts, medium)
        return asked

    def _prompt(self) -> Tensor:
        prompt = self._prompts.here()
        if prompt is None:
            raise UnsupportedError(
                f"which tiles of a batch are one picture stands only in the prompt of {self.family.model_type} models: "
                "encode pictures in generate() or in the whole model, with pixel values"
            )
        return prompt[0]

    @property
    def _project(self) -> Any:
        projector = self.family.projector(self.base)
        # The hook of this class only listens while the encoder runs.
        return (lambda states: states) if projector is None else projector

    def _patches(self, reading: _Reading) -> dict[str, Tensor]:
        """What was read, by name: (all patches, ...) tensors."""
        patches: dict[str, Tensor] = {}
        for name in ("received", "given", "cls"):
            if name in self.reads:
                parts = [_in_a_row(layer[name]) for layer in reading.layers]
                patches[name] = torch.stack(parts, -1)
        if "keys" in self.reads:
            patches["keys"] = _in_a_row(reading.layers[-1]["keys"])
        if reading.states is not None:
            patches["states"] = self.family.encoder_states(self.base, reading.states)
        if reading.levels:
            levels = [_in_a_row(reading.levels[i]) for i in sorted(reading.levels)]
            patches["levels"] = torch.stack(levels, 1)
        return patches

    def _pictures(self, shape: tuple[int, int], device: torch.device) -> Tensor:
        """(all patches,) which picture of the encoder each patch is of. shape: pictures, and the tokens of each."""
        pictures, tokens = shape
        patches = tokens - self.family.prefix_tokens(self.base.config)
        return torch.arange(pictures, device=device).repeat_interleave(patches)

    @untraced
    def _note_level(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._current.reading is not None:
            states = output if isinstance(output, Tensor) else output[0]
            prefix = self.family.prefix_tokens(self.base.config)
            states = states[:, prefix:] if states.ndim == 3 else states.unsqueeze(0)  # a packed encoder has no prefix
            self._current.reading.levels.setdefault(number, []).append(states)

    @untraced
    def _note_read(self, which: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._current.reading is not None:
            self._current.reading.read.setdefault(which, output)

    @untraced
    def _carry(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Behind an encoder layer: the method's own tokens go through it beside the patches."""
        reading = self._current.reading
        if reading is not None:
            readers, key, value = reading.readers, reading.read[0], reading.read[1]
            if readers is None:
                assert self.method is not None and self.method.seeds is not None
                readers = self.method.seeds.to(key).expand(len(key), -1, -1)
                reading.shape = (key.shape[0], key.shape[1])
            reading.readers = self.family.carry(layer, readers.to(key.device), key, value)
            reading.read.clear()

    @untraced
    def _note_states(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._current.reading is not None:
            self._current.reading.states = args[0]

    def _attend(
        self, layer: int, kernel: Any, module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self._current.reading is not None:
            parts = self._current.reading.layers[layer]
            prefix, scaling = (
                self.family.prefix_tokens(self.base.config),
                kwargs.get("scaling") or query.shape[-1] ** -0.5,
            )
            bounds = kwargs.get("cu_seq_lens_q")
            sizes = [query.shape[2]] if bounds is None else bounds.diff().tolist()
            mask = _bool(kwargs.get("attention_mask", args[1] if len(args) > 1 else None))
            flash = "flash" in str(module.config._attn_implementation)
            if flash and bounds is None and len(query) < self._current.reading.images:
                raise UnsupportedError(
                    "this vision encoder reads several pictures as one, and under flash attention nothing says where "
                    'each of them ends, which the method needs: load the model with attn_implementation="sdpa"'
                )
            for q, k in zip(query.split(sizes, dim=2), key.split(sizes, dim=2), strict=True):
                k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
                for name, value in read_attention(self.reads, q, k, scaling, prefix, mask).items():
                    parts.setdefault(name, []).append(value)
        return kernel(module, query, key, *args, **kwargs)


def _bool(mask: Any) -> Tensor | None:
    """bool (pictures | 1, n, n) of an encoder's own mask, bool or additive (pictures | 1, 1, n, n)."""
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return None
    return (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0]


def _in_a_row(parts: Sequence[Tensor]) -> Tensor:
    """(all patches, ...) of one (pictures, patches, ...) tensor a call of the vision attention."""
    return torch.cat([part.flatten(0, 1) for part in parts])


class EncoderAction(Action):
    """What was chosen when the images were encoded leaves in front of layer 0."""

    def __init__(self, place: EncoderPlace, forward: Forward) -> None:
        self.place, self.forward = place, forward

    def begin(self) -> None:
        forward, method = self.forward, self.place.method
        if method is not None and self.place.outcome.records:
            places = [(row, at + forward.past) for row, at in forward.places]
            scores = of_images([image.scores for image in forward.images], places, forward.logical)
            if scores is not None:
                forward.scores[method.name] = {0: scores}
        if all(image.keep is None for image in forward.images):
            return
        keep = forward.valid().clone()
        for image, (row, place) in zip(forward.images, forward.places, strict=True):
            if image.keep is not None:
                keep[row, place] &= image.keep.to(keep.device)
        forward.drop(keep)
