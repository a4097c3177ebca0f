"""A KV cache of any kind that never got some of the prompt's tokens, while transformers still sees the full length.

Where the layers of a cache cannot be swapped for pruned ones (static, quantised, offloaded), they stay as they are and
hold the tokens that the decoder was handed. Only the cache itself answers for the tokens that are missing, and knows
where they are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .cache import PrunedLayer, active
from .rows import Rows
from .upstream import ENTRYLESS_LAYERS, Cache


class Gapped(Cache):
    """What is mixed into the class of such a cache, see `open_gaps`. Slots are physical, positions are logical.

    index: (batch, slots) the position that each of the first slots holds, -1 for a filler, as many in every layer;
    later slots follow each other without a gap. None while all do. gap: positions that were never handed to the layers,
    fillers deducted: a slot behind those of `index` holds its own number and so many more. ragged: whether there is a
    filler. plain: the class without this one.
    """

    plain: type[Cache]
    index: Tensor | None
    gap: int
    ragged: bool

    @property
    def whole(self) -> bool:
        """Whether nothing is missing."""
        return self.index is None

    @property
    def slots(self) -> int:
        """Slots that hold something; a static layer counts on its device, which this waits for."""
        return int(super().get_seq_length())

    def sizes(self, queries: int, layer: int) -> tuple[int, int]:
        """How many slots a layer will attend to with so many new ones, and the number of the first."""
        return super().get_mask_sizes(queries, layer)

    def positions(self, first: int, slots: int, device: torch.device) -> Tensor:
        """(batch | 1, slots) the position of so many slots from the first on, -1 at fillers; of coming tokens, too."""
        at = torch.arange(first, first + slots, device=device)
        later = (at + self.gap).unsqueeze(0)
        if self.index is None:
            return later
        known = self.index.to(device)[:, at.clamp(max=self.index.shape[1] - 1)]
        return torch.where(at < self.index.shape[1], known, later)

    def check_room(self, tokens: int) -> None:
        """Refuse a prompt of which so many tokens stay where static layers have no room for them."""
        rooms = [room for room in map(_room, self.layers) if room is not None]
        if rooms and self.slots + tokens > min(rooms):
            raise ValueError(
                f"this static cache has room for {min(rooms)} tokens, and with the {tokens} of this prompt that stay "
                f"it would hold {self.slots + tokens}: make it with a larger max_cache_len, or keep fewer"
            )

    def expect(self, rows: Rows, tokens: int) -> None:
        """Of so many new tokens only these rows are about to come."""
        past = self.slots
        old = self.positions(0, past, rows.source.device).expand(len(rows.source), -1)
        new = torch.where(rows.real, rows.source + past + self.gap, -1)
        self.index = torch.cat([old, new], 1)
        self.gap += tokens - new.shape[1]
        self.ragged = self.ragged or rows.ragged

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new entries; only while the model is pruned, which alone knows what to mask."""
        # In what torch compiles a step goes on with what a prefill began, and that was asked.
        if not torch.compiler.is_compiling() and not self.whole:
            forward = active.forward
            if forward is None or forward.cache is not self:
                raise UnsupportedError(
                    "this KV cache was pruned by foveate and only works while the model is pruned: call the model "
                    "inside the same `with foveate.prune(...)` block, or start from a new cache"
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def _inside(self) -> bool:
        # What torch compiles is handed masks, and asks nothing.
        forward = None if torch.compiler.is_compiling() else active.forward
        return forward is not None and forward.cache is self and forward.inside

    # -- what transformers asks for, answered logically outside of the decoder --------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length."""
        return super().get_seq_length(layer_idx) + (0 if self._inside else self.gap)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """All positions with the coming queries, and offset 0, whatever the layer forgets."""
        if self._inside:
            return self.sizes(query_length, layer_idx)
        if query_length > 1:
            return int(self.get_seq_length()) + query_length, 0
        kept, first = self.sizes(query_length, layer_idx)  # of a static layer always as many
        return kept + first + self.gap, 0

    def reset(self) -> None:
        """Forget everything: the cache is again what it was made as."""
        super().reset()
        close_gaps(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` logical positions (assisted decoding)."""
        if self.index is None or tokens_to_remove >= 0:
            super().crop(tokens_to_remove)
            return
        slots, known = self.slots, self.index.shape[1]
        within = max(0, -tokens_to_remove - (slots - known))  # positions among those that not every sample holds
        gone = self.index >= slots + self.gap + tokens_to_remove
        cut = int(gone.sum(1).max())
        if within and not bool(gone[:, known - cut :].all()):
            raise UnsupportedError(
                "the samples of this pruned cache hold differently many of the tokens that it is cropped by: crop "
                "less, run one sample at a time, or use the default dynamic cache"
            )
        super().crop(tokens_to_remove + within - cut)
        self.index, self.gap = self.index[:, : known - cut], self.gap - (within - cut)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._follow(lambda index: index.index_select(0, beam_idx.to(index.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        super().batch_repeat_interleave(repeats)
        self._follow(lambda index: index.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select samples."""
        super().batch_select_indices(indices)
        self._follow(lambda index: index[indices.to(index.device)])

    def _follow(self, change: Any) -> None:
        if self.index is not None:
            self.index = change(self.index)

    def __reduce__(self) -> Any:
        """Copies and files know the class that it was made of."""
        return _empty, (self.plain,), self.__dict__


def _room(layer: Any) -> int | None:
    """Tokens that a layer may ever hold, None for all."""
    return None if getattr(layer, "is_sliding", False) else getattr(layer, "max_cache_len", None)


@functools.cache
def _gapped(plain: type[Cache]) -> type[Gapped]:
    return type(plain.__name__, (Gapped, plain), {"plain": plain})


def _empty(plain: type[Cache]) -> Gapped:
    kind = _gapped(plain)  # type: ignore[arg-type]
    return kind.__new__(kind)


def is_gapped(cache: Any) -> TypeGuard[Gapped]:
    """Whether this cache answers for tokens that it may not hold."""
    return isinstance(cache, Gapped)


def open_gaps(cache: Cache) -> None:
    """Let a cache of any kind answer logically; what it holds stays as it is."""
    if not is_gapped(cache):
        cache.__class__ = _gapped(type(cache))  # type: ignore[arg-type]
        cache.__dict__.update(index=None, gap=0, ragged=False)


def close_gaps(cache: Any) -> None:
    """Let a cache that holds nothing, or everything, be what it was made as."""
    if is_gapped(cache):
        for name in ("index", "gap", "ragged"):
            del cache.__dict__[name]
        cache.__class__ = cache.plain  # type: ignore[assignment]


def close_unused(cache: Any) -> None:
    """Behind a pass, or where it was refused: a cache that lost nothing is what it was."""
    if is_gapped(cache) and cache.whole:
        close_gaps(cache)


@dataclass(frozen=True)
class HeldLayer:
    """One layer of a cache whose layers stay as they are, for the report: what a pruned layer says of itself."""

    cache: Any
    number: int

    @property
    def kind(self) -> str:
        """What it holds: tokens of the prompt."""
        return "self"

    @property
    def length(self) -> int:
        """Logical length."""
        return int(self.cache.get_seq_length())

    @property
    def is_sliding(self) -> bool:
        """Whether a window passes over it."""
        return bool(self.cache.is_sliding[self.number])

    @property
    def window(self) -> int | None:
        """Slots that it has room for at most, None where it is as long as it must be."""
        layer = self.cache.layers[self.number]
        if not self.is_sliding:
            return None
        return int(getattr(layer, "max_cache_len", None) or layer.sliding_window - 1)

    @property
    def most(self) -> int:
        """Slots that it would hold if nothing were missing."""
        return self.length if self.window is None else min(self.length, self.window)

    @property
    def physical(self) -> int:
        """Slots that hold something."""
        slots = self.cache.slots if is_gapped(self.cache) else self.length
        return slots if self.window is None else min(slots, self.window)

    @property
    def index(self) -> Tensor | None:
        """Not None where something is missing."""
        return self.cache.index if is_gapped(self.cache) else None

    def full_index(self, batch: int, device: torch.device) -> Tensor:
        """(batch, 1, slots) logical position of every slot, -1 for fillers."""
        positions = self.cache.positions(self.cache.slots - self.physical, self.physical, device)
        return positions.expand(batch, -1).unsqueeze(1)

    @property
    def bytes(self) -> int:
        """Bytes of keys and values; of a static layer, of those slots that hold something."""
        layer = self.cache.layers[self.number]
        room = getattr(layer, "max_cache_len", None)
        held = sum(_bytes(value) for name, value in vars(layer).items() if "keys" in name or "values" in name)
        return held if room is None else held // room * self.physical

    def slide(self) -> None:
        """Nothing: the layer itself forgets what its window left behind."""


def layers_of(cache: Any) -> dict[int, Any]:
    """The layers of a cache that hold entries, by number: pruned ones, or what stands for one that stays as it is."""
    return {
        number: layer if isinstance(layer, PrunedLayer) else HeldLayer(cache, number)
        for number, layer in enumerate(cache.layers)
        if not isinstance(layer, ENTRYLESS_LAYERS)
    }


def _bytes(held: Any) -> int:
    """Of tensors in any containers, quantised ones by what they are made of."""
    if isinstance(held, Tensor):
        if type(held) is not Tensor and hasattr(held, "__tensor_flatten__"):
            return sum(_bytes(getattr(held, name)) for name in held.__tensor_flatten__()[0])
        return held.numel() * held.element_size()
    if isinstance(held, dict):
        held = held.values()
    elif not isinstance(held, (list, tuple)):
        return 0
    return sum(map(_bytes, held))
