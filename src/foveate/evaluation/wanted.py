"""What is asked of synthetic inputs, and what their makers share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.asking.mistake import Mistake

WORD, WHOLE = 3, 4  # ids of text that stand behind a frame or in front of a tile, and in front of a whole picture
EDGES = (("vision_start", "vision_end"), ("image_start", "image_end"), ("boi", "eoi"))
Config = Any
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Wanted:
    """What is asked for. frames: pictures of each sample. tokens: of each picture, None for the model's usual number.

    rng: makes the noise.
    """

    config: Config
    batch: int
    frames: int
    tokens: int | None
    rng: torch.Generator

    @property
    def pictures(self) -> int:
        """Of all samples."""
        return self.batch * self.frames

    def noise(self, *shape: int) -> Tensor:
        """Normal noise."""
        return torch.randn(shape, generator=self.rng)

    def squares(self, *shape: int) -> Tensor:
        """Pictures of the size that the encoder sees."""
        size = getattr(self.config.vision_config, "image_size", None)
        if size is None:
            raise unknown_inputs(self.config)
        edge = size if isinstance(size, int) else size[0]
        return self.noise(*shape, 3, edge, edge)

    def grid(self, usual: int) -> tuple[int, int]:
        """Rows and columns of a picture with so many tokens, as square as it can be."""
        tokens = self.tokens or usual
        rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
        if tokens > 4 * rows * rows:
            square = math.isqrt(tokens) ** 2
            raise Mistake(f"--image-tokens {tokens} makes no picture of a usual shape: use {square} or {square + 4}")
        return rows, tokens // rows


def unknown_inputs(config: Config) -> Mistake:
    """That nobody said how inputs of this architecture look."""
    return Mistake(f"no synthetic inputs for {config.model_type} models: measure a model of another family")


def edges(config: Config, *names: tuple[str, str]) -> tuple[list[int], list[int]]:
    """The ids in front of an image and behind it, where the configuration has some of these names."""
    for pair in names:
        ids: list[Any] = [getattr(config, f"{name}_token_id", None) for name in pair]
        if None not in ids:
            return [ids[0]], [ids[1]]
    return [], []


def check_tokens(wanted: Wanted, count: int) -> None:
    """Raise Mistake where another number of tokens is wanted than the only one that a picture has."""
    if wanted.tokens not in (None, count):
        raise Mistake(f"--image-tokens {wanted.tokens}: this model gives every picture {count} tokens")
