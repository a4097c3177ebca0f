"""What the tiny models share: sizes, ids, and how a family says what its model and inputs are."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from . import register

# What this release of transformers calls the KV cache.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

PAD, TEXT, VOCAB = 0, 90, 96  # text ids are 1..89, so that nothing special appears by accident
BREAK, MARK = 90, 91  # structure among the tokens of an image, where a family has some
VISION_START, VISION_END, VIDEO, IMAGE = 92, 93, 94, 95
PATCH = 4
LLM: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
)
VISION: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


def clip(image_size: int) -> CLIPVisionConfig:
    """A CLIP encoder."""
    return CLIPVisionConfig(**VISION, image_size=image_size, patch_size=PATCH, projection_dim=32)


def noise(rng: torch.Generator, *shape: int) -> Tensor:
    """Pixels with smooth and rough parts, so that patches of one picture differ from each other."""
    return torch.randn(shape, generator=rng) * torch.rand((*shape[:-2], 1, 1), generator=rng).mul(2)


def moving(frames: int, patches: int, values: int, rng: torch.Generator) -> Tensor:
    """(frames * patches, values) pixels of a film in which half of the patches change from one frame to the next."""
    still = torch.randn(1, patches, values, generator=rng)
    moves = torch.rand(frames, patches, 1, generator=rng) < 0.5
    return torch.where(moves, torch.randn(frames, patches, values, generator=rng), still).flatten(0, 1)


class Tiny:
    """A family's tiny model and its inputs. A subclass with a `name` is known as soon as it is there.

    name: what tests call it; model_type: of its configuration, the name if not said. whole: all rows of the matrix run
    in CI, not a sample of them. variant: another encoder or decoder of a family that has a tiny model already.
    refused: methods that its models cannot do, and that are refused. rounding: how much more than others it rounds.
    in_prompt: whether image tokens sit in the prompt. image_id: the placeholder. before, after: ids around every image.
    first: words in front of the first image. types: inputs that mark the placeholders. decoder: name of the language
    model inside the base model. window: how many tokens most of its layers see, None for all. both_ways: whether image
    tokens see later ones. backends: implementations of attention that it has. mixes: whether a prompt may hold images
    and videos. heads, ends: tokens of a film in front of each frame, and behind all, that are no part of any.
    """

    name: str = ""
    model_type: str = ""
    whole = variant = False
    refused: tuple[str, ...] = ()
    rounding = 1.0
    in_prompt = mixes = True
    heads = ends = 0
    image_id = IMAGE
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    window: int | None = None
    both_ways = False
    backends: tuple[str, ...] = ("sdpa", "eager")
    first = 2
    types: tuple[str, ...] = ()
    decoder = "language_model"

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            cls.whole = vars(cls).get("whole", False)
            cls.model_type = cls.model_type if cls.variant else vars(cls).get("model_type", cls.name)
            if cls.model_type in CONFIG_MAPPING:  # an older transformers does without it
                register(cls())

    def options(self) -> dict[str, Any]:
        """Arguments of the configuration."""
        raise NotImplementedError

    def config(self) -> PreTrainedConfig:
        return CONFIG_MAPPING[self.model_type](**self.options())

    def make(self, config: PreTrainedConfig) -> PreTrainedModel:
        return AutoModelForImageTextToText.from_config(config)

    def language_model(self, model: PreTrainedModel) -> nn.Module:
        """The decoder in it: takes embeddings, and has the layers."""
        return getattr(model.model, self.decoder)

    def replay(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        """`generate()` of the untouched model, which must take a logits processor."""
        return model.generate(**kwargs)  # type: ignore[operator]

    def tokens(self, kind: int) -> int:
        """How many image tokens the processor writes into the prompt for an image of this kind, one of four."""
        raise NotImplementedError

    def image(self, kind: int) -> list[int]:
        """The ids an image is written as."""
        return [*self.before, *[self.image_id] * self.tokens(kind), *self.after]

    def pixels(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        """The inputs that bring these images, of which there is at least one."""
        raise NotImplementedError

    def clip(self, kind: int) -> list[int]:
        """How many tokens each frame of a film of this kind, one of four, has; none for a family without videos."""
        return []

    def film(self, kind: int) -> list[int]:
        """The ids a film is written as."""
        raise NotImplementedError

    def films(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        """The inputs that bring these films, of which there is at least one."""
        raise NotImplementedError

    def images(self, ids: Tensor, kinds: Sequence[Sequence[int]], rng: torch.Generator) -> dict[str, Tensor]:
        """The same from the kinds of each row's images, some of them."""
        return self.pixels([kind for row in kinds for kind in row], rng)

    def features(self, kind: int) -> int:
        """How many image tokens the decoder reads of an image of this kind."""
        return self.tokens(kind)

    def go_on(self, model: PreTrainedModel, batch: dict, turn: dict, length: int, image: bool) -> dict[str, Tensor]:
        """Make `turn` what `generate` takes after a talk of `length` tokens that began with `batch`."""
        return turn

    def beside(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
        """Two batches as one, the shorter prompts padded on the left and the smaller pictures behind."""
        parts: Sequence[Tensor]
        length = 3 + max(batch["input_ids"].shape[1] for batch in (one, other))
        words = ("input_ids", "attention_mask", "token_type_ids", *self.types)
        both = {}
        for name in one:
            parts = [one[name], other[name]]
            if name in words:
                parts = [torch.nn.functional.pad(part, (length - part.shape[1], 0)) for part in parts]
            elif parts[0].shape[1:] != parts[1].shape[1:]:
                shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
                room = [part.new_zeros(len(part), *shape) for part in parts]
                for old, new in zip(parts, room, strict=True):
                    new[tuple(slice(size) for size in old.shape)] = old
                parts = room
            both[name] = torch.cat(parts)
        return both

    def inputs(
        self,
        images: Sequence[int] = (1,),
        text: Sequence[int] = (6,),
        seed: int = 0,
        between: int = 2,
        alike: bool = False,
    ) -> dict[str, Tensor]:
        """See `building.inputs`."""
        rng = torch.Generator().manual_seed(1000 + seed)

        def words(n: int) -> list[int]:
            return torch.randint(3, TEXT, (n,), generator=rng).tolist()

        rows, kinds, next_kind = [], [], count(seed, 0 if alike else 1)
        for n_images, n_words in zip(images, text, strict=True):
            row, row_kinds = words(self.first), []
            for _ in range(n_images):
                row_kinds.append(next(next_kind) % 4)
                row += self.image(row_kinds[-1]) + words(between)
            rows.append(row + words(n_words))
            kinds.append(row_kinds)
        batch = self.padded(rows)
        return batch | self.images(batch["input_ids"], kinds, rng) if any(images) else batch

    def videos(
        self,
        videos: Sequence[int] = (1,),
        text: Sequence[int] = (6,),
        images: Sequence[int] | None = None,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """See `building.videos`."""
        rng = torch.Generator().manual_seed(2000 + seed)

        def words(n: int) -> list[int]:
            return torch.randint(3, TEXT, (n,), generator=rng).tolist()

        films: list[int] = []
        pictures: list[int] = []
        rows = []
        for number, (n_videos, n_words) in enumerate(zip(videos, text, strict=True)):
            row = words(self.first)
            for _ in range(n_videos):
                films.append((len(films) + seed) % 4)
                row += self.film(films[-1]) + words(2)
            for _ in range(0 if images is None else images[number]):
                pictures.append(len(pictures) % 4)
                row += self.image(pictures[-1]) + words(2)
            rows.append(row + words(n_words))
        batch = self.padded(rows)
        return batch | (self.films(films, rng) if films else {}) | (self.pixels(pictures, rng) if pictures else {})

    def padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Rows of ids as a batch, padded on the left."""
        length = max(map(len, rows))
        ids = torch.tensor([[PAD] * (length - len(row)) + [*row] for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        kinds = (ids == self.image_id).int() + 2 * (ids == VIDEO).int()
        return {"input_ids": ids, "attention_mask": mask} | dict.fromkeys(self.types, kinds)
