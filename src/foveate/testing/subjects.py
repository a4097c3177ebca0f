"""What methods are checked on: small models of one family, and prompts for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from foveate.evaluation.geometries import endless
from foveate.evaluation.synthetic import synthetic

from .tiny import known
from .tiny.building import BATCHES, build, inputs, randomize

PEAK = 1.5  # how much attention prefers some tokens to others


@dataclass(frozen=True)
class Subject:
    """Models of one family with equal weights, and prompts for them.

    build: makes the model with an implementation of attention, one of `backends`. prompts: inputs of `generate()`: one
    sample, and several padded on the left. rounding: how much more than others the family rounds.
    """

    family: str
    build: Callable[[str], PreTrainedModel]
    prompts: dict[str, dict[str, Tensor]]
    backends: tuple[str, ...] = ("sdpa", "eager")
    rounding: float = 1.0


def of_tiny(name: str) -> Subject:
    """The tiny model of that name.

    Raises:
        ValueError: where there is none.
    """
    if name not in known():
        raise ValueError(f"no tiny model named {name!r}; known: {', '.join(sorted(known()))}")
    tiny, (one, padded) = known()[name], BATCHES.values()
    prompts = {"one sample": inputs(name, **one), "a padded batch": inputs(name, **padded)}
    return Subject(name, partial(build, name), prompts, tiny.backends, tiny.rounding)


def of_model(config_or_model: PreTrainedConfig | PreTrainedModel) -> Subject:
    """A model as it is, in float32; or a configuration, which gets random weights. Pictures are noise."""
    if isinstance(config_or_model, PreTrainedModel):
        model = config_or_model
    else:
        model = AutoModelForImageTextToText.from_config(config_or_model)
        randomize(model, 0, PEAK)
    model = copy.deepcopy(model).float().eval().requires_grad_(False)
    endless(model)
    prompts = {
        "one sample": synthetic(model.config, 1),
        "a padded batch": synthetic(model.config, 2, padded=True, seed=1),
    }
    return Subject(model.config.model_type, partial(_with_attention, model), prompts)


def _with_attention(model: Any, attn: str) -> PreTrainedModel:
    twin = copy.deepcopy(model)
    twin.set_attn_implementation(attn)
    return twin
