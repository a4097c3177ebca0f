"""What every method shares: options, budgets, and the four places where image tokens can be dropped."""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

Place = Literal["encoder", "layer", "cache", "cross"]
CONFIG_NAME = "foveate_config.json"


@dataclass(frozen=True)
class ImageGroups:
    """The image tokens that a decoder method chooses from, one group per image of the batch.

    Tokens that carry structure instead of image content (newline tokens of tiled models) are `pinned`:
    they always stay, are paid from the image's budget, and are not in `positions`.

    positions: (groups, n) index of each token among the tokens of this forward; -1 where a group is shorter.
    row: (groups,) the sample an image belongs to.
    count: (groups,) candidates of the image, i.e. the valid entries of `positions`.
    pinned: (groups,) tokens of the image that always stay.
    """

    positions: Tensor
    row: Tensor
    count: Tensor
    pinned: Tensor

    @property
    def total(self) -> Tensor:
        """(groups,) tokens of each image, pinned ones included."""
        return self.count + self.pinned


@dataclass(frozen=True)
class EncoderTokens:
    """Equally shaped tiles (or whole images) as they leave the vision encoder.

    grid: (rows, columns) of the tile; n = rows * columns tokens in raster order.
    received: (tiles, n) attention each patch receives, mean over the patch queries and heads, or None.
    given: (tiles, n) attention each patch gives to the patches, mean over keys and heads, or None.
    """

    grid: tuple[int, int]
    tiles: int
    device: torch.device
    received: Tensor | None = None
    given: Tensor | None = None


def check_keep(keep: object) -> None:
    """Raise ValueError unless `keep` is a float in (0, 1] or an int >= 1."""
    is_count = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if not is_count and not (isinstance(keep, float) and 0 < keep <= 1):
        raise ValueError(
            f"keep must be a float in (0, 1], the fraction that stays, or an int >= 1, tokens per image; got {keep!r}"
        )


def check_range(name: str, value: object, low: float, high: float = math.inf, *, integer: bool = False) -> None:
    """Raise ValueError unless `low <= value <= high` (and `value` is an int where `integer`)."""
    kinds = int if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "an int" if integer else "a number"
        bounds = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {kind} {bounds}, got {value!r}")


def token_budget(keep: float | int, tokens: int) -> int:
    """How many of `tokens` stay: floor(keep * tokens) for a fraction, min(keep, tokens) for a count; never 0."""
    # The epsilon undoes binary rounding: 0.29 * 100 is 28.999999999999996.
    return min(tokens, keep) if isinstance(keep, int) else max(1, math.floor(keep * tokens + 1e-6))


def floor_budget(share: Tensor, groups: ImageGroups) -> Tensor:
    """`floor(share * total) - pinned` of each image, at least 1 and at most its candidates.

    share: (..., groups) fraction of each image that stays. Returns int64 of the same shape.
    """
    budget = (share * groups.total + 1e-4).floor().long() - groups.pinned
    return torch.minimum(budget.clamp(min=1), groups.count)


def topk_mask(scores: Tensor, k: Tensor | int) -> Tensor:
    """True for the `k` largest of the last dimension; among equal scores the lower index wins.

    scores: (..., n); -inf marks what may not be chosen. k: (...) or one number. Returns bool (..., n).
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    )
    limit = k.unsqueeze(-1) if isinstance(k, Tensor) else k
    return (rank < limit) & (scores > -math.inf)


@dataclass
class Method(ABC):
    """Base of all methods. The fields of the dataclass are the method's whole configuration.

    keep: float in (0, 1], the fraction of each image's tokens that stay, or int >= 1, tokens per image.

    Raises:
        ValueError: for a value outside the range that the message names.
    """

    name: ClassVar[str]
    place: ClassVar[Place]
    summary: ClassVar[str]
    source: ClassVar[str]

    keep: float | int

    def __post_init__(self) -> None:
        check_keep(self.keep)

    @property
    def keeps_all(self) -> bool:
        """Whether the options say, without looking at an image, that nothing is dropped."""
        return isinstance(self.keep, float) and self.keep == 1.0

    def share(self, groups: ImageGroups) -> Tensor:
        """(groups,) fraction of each image's tokens that `keep` asks for."""
        if isinstance(self.keep, int):
            return (self.keep / groups.total.double()).clamp(max=1.0)
        return torch.full_like(groups.total, self.keep, dtype=torch.float64)

    def to_dict(self) -> dict[str, Any]:
        """The method's name and options, JSON-safe."""
        return {"method": self.name, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(config: dict[str, Any]) -> Method:
        """Build the method that `to_dict` described."""
        from . import get_method

        options = dict(config)
        try:
            name = options.pop("method")
        except KeyError:
            raise ValueError("the configuration names no 'method'") from None
        return get_method(name, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the options to `foveate_config.json` in `folder`, beside the model's own files."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @staticmethod
    def from_pretrained(folder: str | Path) -> Method:
        """Read the method that `save_pretrained` wrote to `folder`."""
        return Method.from_dict(json.loads((Path(folder) / CONFIG_NAME).read_text()))


@dataclass
class EncoderMethod(Method):
    """Chooses tokens between the vision encoder and the LLM; the LLM never sees the others."""

    place: ClassVar[Place] = "encoder"
    uses_attention: ClassVar[bool] = False

    @abstractmethod
    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        """Which tokens stay.

        tokens: equally shaped tiles. budget: (tiles,) tokens that each may keep. Returns bool (tiles, n).
        """


@dataclass
class LayerMethod(Method):
    """Drops image tokens inside the LLM: from layer `layer` on they are gone."""

    place: ClassVar[Place] = "layer"
    layer: int

    @abstractmethod
    def select(self, attention: Tensor, groups: ImageGroups) -> Tensor:
        """Which tokens go on.

        attention: (groups, heads, n) attention of the last prompt token in layer `layer - 1`, -inf at padding.
        Returns bool (groups, n).
        """


@dataclass
class CacheMethod(Method):
    """Evicts image tokens from the KV cache of each layer once the layer's prefill attention is done."""

    place: ClassVar[Place] = "cache"

    @property
    @abstractmethod
    def needs_all_layers(self) -> bool:
        """Whether the budgets compare layers, so that eviction waits until the last layer has attended."""

    def first_layer(self) -> int:
        """Layers before this one keep everything."""
        return 0

    @abstractmethod
    def budgets(self, mass: Tensor, groups: ImageGroups) -> Tensor:
        """(layers, groups) tokens of each image that each layer keeps in every head.

        mass: (layers, batch) attention of the last prompt token on all image tokens, mean over heads, in [0, 1].
        """

    @abstractmethod
    def select(self, attention: Tensor, budget: Tensor) -> Tensor:
        """Which entries stay in one layer's cache.

        attention: (groups, kv_heads, n) attention of the last prompt token, mean over the query heads that
        share a KV head, -inf at padding. budget: (groups,). Returns bool (groups, kv_heads, n).
        """


@dataclass
class CrossMethod(Method):
    """Trims the image features that cross-attention layers read, after the first of them has attended."""

    place: ClassVar[Place] = "cross"

    @abstractmethod
    def select(self, attention: Tensor, valid: Tensor, images: Tensor) -> Tensor:
        """Which features stay.

        attention: (batch, heads, n) attention that each feature receives, summed over the text rows.
        valid: bool (batch, n), False for padded tiles. images: (batch,) pictures of each sample.
        Returns bool (batch, n), True only where `valid`.
        """
