"""The model that a method is about to act on, as far as a method may ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Encoder:
    """A vision encoder.

    depth: its layers up to the one whose output the features are made of. width: of the states between them. side:
    patches along one side of a tile; None where pictures keep their shapes.
    """

    depth: int
    width: int
    side: int | None


@dataclass(frozen=True)
class Host:
    """One model.

    model_type: of its configuration. depth: decoder layers. hidden: width of the LLM's hidden states. fingerprint: of
    its weights, worked out when it is called. device: where it lies. projector: a copy of the weights from the vision
    encoder's states to the LLM's, by name; empty where the model has no such module. encoder: its size. heads: query
    heads of a decoder layer. evicting: the decoder layers from whose KV caches a method can evict.
    """

    model_type: str
    depth: int
    hidden: int
    device: torch.device
    fingerprint: Callable[[], str]
    projector: Callable[[], dict[str, Tensor]] = dict
    encoder: Encoder | None = None
    heads: int = 0
    evicting: tuple[int, ...] = ()
