"""One call of `generate()`, read before it runs: by name, as transformers will read it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..errors import UnsupportedError
from .fixtures import Fixtures
from .upstream import cache_in

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""What a model looks at, as transformers calls it, and the input that brings its pixels."""


def brings_pixels(inputs: Mapping[str, Any]) -> bool:
    """Whether pictures or videos are among these inputs of a model, not encoded yet."""
    # Releases before 5.23 call those of Video-LLaVA by a name of their own.
    return any(inputs.get(name) is not None for name in (*PIXELS.values(), "pixel_values_images"))


@dataclass
class GenerateCall:
    """What a call of `generate()` asks for.

    arguments: all of them, by name. config: the generation configuration that they amount to; what the model's own
    defaults say is in it, what nobody said is None. inputs: those that are no part of a configuration, most of them
    the model's.
    """

    arguments: dict[str, Any]
    config: GenerationConfig
    inputs: dict[str, Any]

    @classmethod
    def read(
        cls, model: Any, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> GenerateCall:
        """Read the arguments of a call of the model's `generate`."""
        bound = inspect.signature(generate).bind(*args, **kwargs).arguments
        free = bound.pop("kwargs", {})
        config = copy.deepcopy(bound.get("generation_config") or GenerationConfig())
        config.update(**model.generation_config.to_dict(), defaults_only=True)
        return cls({**bound, **free}, config, config.update(**free))

    @property
    def ids(self) -> Tensor:
        """(batch, prompt) token ids."""
        ids = self.arguments.get("inputs")
        ids = self.arguments.get("input_ids") if ids is None else ids
        if ids is None:
            raise UnsupportedError("foveate finds image tokens by their ids: pass input_ids, not inputs_embeds")
        return ids

    @property
    def brings_images(self) -> bool:
        """Whether there are pictures or videos to look at."""
        return brings_pixels(self.inputs) or bool(self.inputs.get("mm_encoder_outputs"))

    def asks(self, names: Iterable[str]) -> list[str]:
        """Those of these arguments and settings that are set to anything but their neutral value."""
        neutral = {"num_beams": 1, "num_return_sequences": 1, "guidance_scale": 1}
        found = []
        for name in names:
            value = self.arguments.get(name, getattr(self.config, name, None))
            empty = isinstance(value, (list, tuple)) and not value
            if value is not None and value is not False and value != neutral.get(name) and not empty:
                found.append(name)
        return found

    @property
    def cache(self) -> Any:
        """The KV cache that came with the call, if any."""
        return cache_in(self.inputs)

    @property
    def past(self) -> int:
        """Tokens in the cache that came with the call."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())


def refuse_assisted(fixtures: Fixtures, model: Any, why: str) -> None:
    """Let the model's `generate()` raise UnsupportedError(why) where guesses are run several at once."""

    def generate(generate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if GenerateCall.read(model, generate, args, kwargs).asks(("prompt_lookup_num_tokens", "assistant_model")):
            raise UnsupportedError(why)
        return generate(*args, **kwargs)

    fixtures.wrap(model, "generate", generate)


# How what a forward over later tokens of the same prompt must not bring again is called: sizes go with pixels.
_OF_IMAGES = ("pixel_", "image_", "video_", "aspect_ratio_", "mm_encoder_outputs", "second_per_grid_ts")


def split_prompt(arguments: dict[str, Any], candidates: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a forward over a prompt with guessed tokens behind it, as those of two: prompt, then guesses."""
    prompt = arguments["input_ids"].shape[1] - candidates
    tokens = arguments["input_ids"].shape
    head, tail = dict(arguments), {k: v for k, v in arguments.items() if not k.startswith(_OF_IMAGES)}
    for name, value in arguments.items():
        # Ids, and what else there is of each token: types, positions.
        if name != "attention_mask" and isinstance(value, Tensor) and value.shape[-2:] == tokens:
            head[name], tail[name] = value.tensor_split([prompt], dim=-1)
    if arguments.get("attention_mask") is not None:
        head["attention_mask"] = arguments["attention_mask"][:, :-candidates]
    return head, tail


def run_prompt(base: Any, decoder: Any, head: dict[str, Any], tail: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Run the first of the two forwards of `split_prompt`: what it made, and the arguments of the second.

    Where the base model counts positions itself, the second goes on behind the last of the first.
    """
    seen: list[Any] = []
    note = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    try:
        output = base(**head)
    finally:
        note.remove()
    if tail.get("position_ids") is None and seen and seen[0] is not None:
        ahead = torch.arange(1, tail["input_ids"].shape[1] + 1, device=seen[0].device)
        tail = {**tail, "position_ids": seen[0][..., -1:] + ahead}
    made: Tensor = output[made_name(output)]
    return made, tail


def made_name(output: Any) -> str:
    """What a base model's output calls what it made of each token: logits, where the base is the whole model."""
    return "last_hidden_state" if "last_hidden_state" in output else "logits"
