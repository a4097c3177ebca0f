"""Models split over several devices: what is known goes where the layer at hand computes."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def on(device: torch.device, value: T) -> T:
    """The same on a device: a tensor, or what holds tensors (dataclasses, dicts, lists, tuples); others as they are."""
    found: Any = value
    if isinstance(value, Tensor):
        found = value.to(device)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: on(device, getattr(value, field.name)) for field in dataclasses.fields(value)}
        found = dataclasses.replace(value, **fields)
    elif isinstance(value, dict):
        found = {key: on(device, held) for key, held in value.items()}
    elif type(value) in (list, tuple):
        found = type(value)(on(device, held) for held in found)  # type: ignore[call-arg]
    return found
