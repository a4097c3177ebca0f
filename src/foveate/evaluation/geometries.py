"""Real architectures with random weights, from their public configurations.

Speed depends on shapes, not on what the weights know; so nothing is downloaded.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from foveate.asking.mistake import Mistake

from .architectures import GEOMETRIES, Config


def get_config(name: str, tokens: int | None = None) -> Config:
    """The configuration of a geometry. tokens: image tokens, None for its own number.

    Raises:
        Mistake: for an unknown name, or a number of tokens that the architecture cannot give.
    """
    if name not in GEOMETRIES:
        raise Mistake(f"no geometry {name!r}: use {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name].config(tokens)


def build(config: Config, *, device: str, dtype: str, attn: str | None, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, made in place: nothing larger than the model is ever held.

    Weights are normal with a variance of 1 / fan-in, so that logits stay finite at any depth; norms are ones.
    """
    with torch.device(device), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attn)
    model.tie_weights()
    _randomize(model, torch.Generator(device).manual_seed(seed))
    endless(model)
    return model.eval().requires_grad_(False)


def endless(model: PreTrainedModel) -> None:
    """Let no token end an answer, so that every run decodes equally many."""
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)


@torch.no_grad()
def _randomize(model: nn.Module, rng: torch.Generator) -> None:
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            weight.normal_(0, 0.02 if "embed" in name else weight[0].numel() ** -0.5, generator=rng)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)  # norms, gates, [CLS]
