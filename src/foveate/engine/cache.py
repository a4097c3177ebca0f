"""A KV cache layer whose entries can be evicted, while transformers still sees the full length."""

from __future__ import annotations

import threading
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .memory import Memory
from .rows import Compaction, Stream, compact, gather_entries
from .shared import Shared
from .upstream import DynamicLayer


class Pass(Protocol):
    """What a cache layer asks of a forward pass."""

    streams: dict[str, Stream]

    def owns(self, layer: PrunedLayer) -> bool:
        """Whether the layer belongs to the cache of this pass."""
        ...


class _Active(threading.local):
    forward: Any = None


active = _Active()
"""The pruned forward pass (`Pass`) that this thread is in, if any."""


class PrunedLayer(DynamicLayer):
    """Holds fewer entries than it answers for.

    `length` is logical: what `get_seq_length` and the mask sizes say. `keys` and `values` are physical. While
    `index` is None the slots are the newest positions, in order. Otherwise `index` (batch, 1 | kv_heads, slots) says
    which logical position each of the first slots holds, -1 for a filler; later slots are the newest positions. Fillers
    come first and fill every head up to the longest; unless heads are `uneven`, all of a row have equally many.

    sliding_window: how far back its queries see, None for all the way. The layer then says what transformers' own says,
    and behind a pass it holds no more slots than that one.
    """

    def __init__(self, kind: Literal["self", "cross"] = "self") -> None:
        super().__init__()
        self.kind = kind
        self.length = 0
        self.index: Tensor | None = None
        self.ragged = False
        self.uneven = False
        self.sliding_window: int | None = None
        self.record_past = False  # assisted decoding: nothing leaves the window until `crop`
        self.fixed_point: int | None = None  # the slot that every decoding step evicts
        self.memory: Memory | None = None  # what later steps read of the images here
        self._filled: tuple[Tensor, Tensor] | None = None
        self.shared = Shared()

    @classmethod
    def adopt(cls, layer: DynamicLayer, kind: Literal["self", "cross"]) -> PrunedLayer:
        """Take over a plain layer with what it holds."""
        new = cls(kind)
        new.__dict__.update(layer.__dict__)
        new.length = layer.get_seq_length()
        return new

    @property
    def physical(self) -> int:
        """Slots really held."""
        return 0 if self.keys is None or self.keys.numel() == 0 else self.keys.shape[-2]

    @property
    def is_sliding(self) -> bool:  # type: ignore[override]
        """Whether a window passes over it."""
        return self.sliding_window is not None

    @property
    def most(self) -> int:
        """Slots that it may hold behind a pass of the logical length."""
        return self.length if self.sliding_window is None else min(self.length, self.sliding_window - 1)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can put this layer back to where it was."""
        return self.kind == "self" and self.fixed_point is None

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        held = [t for t in (self.keys, self.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new entries; inside a pruned forward they may be only the surviving rows of it."""
        forward: Pass | None = active.forward
        new, rows = key_states.shape[-2], None
        if forward is not None and forward.owns(self):
            stream = forward.streams[self.kind]
            rows = stream.rows
            new = new if rows is None else stream.tokens
        elif self.shared.pruned:
            raise UnsupportedError(
                "this KV cache was pruned by foveate and only works while the model is pruned: call the model "
                "inside the same `with foveate.prune(...)` block, or start from a new cache"
            )
        if rows is not None:
            placed = stream.placed(self.length)
            assert placed is not None
            added = placed.to(key_states.device)
            old = self.full_index(added.shape[0], added.device)
            self.index = torch.cat([old, added.expand(-1, old.shape[1], -1)], dim=-1) if self.length else added
            self.ragged = self.ragged or rows.ragged
            self.shared.pruned = True
        self.slide()  # of a pass outside this session
        seen = self.most + new
        self.length += new
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if not self.record_past or self.index is not None:
            return keys, values
        # What is only held to be taken back is not seen, and the model's mask has no place for it.
        return keys[:, :, -seen:], values[:, :, -seen:]

    def full_index(self, batch: int, device: torch.device) -> Tensor:
        """(batch, 1 | kv_heads, slots) logical position of every slot, -1 for fillers."""
        tail = self.physical - (0 if self.index is None else self.index.shape[-1])
        if self.index is None:
            return torch.arange(self.length - tail, self.length, device=device).expand(batch, 1, -1)
        if not tail:
            return self.index
        index = self.index

        def made() -> Tensor:
            newest = torch.arange(self.length - tail, self.length, device=index.device)
            return torch.cat([index, newest.expand(*index.shape[:2], -1)], dim=-1)

        return self.shared.once(made, index, key=(self.length, tail))

    def filled(self) -> Tensor | None:
        """bool (batch, 1 | kv_heads, slots), False at fillers; None when there are none."""
        if self.index is None or not self.ragged:
            return None
        held = self.physical
        # Kept with room to grow: decoding must not build it anew in every layer of every step.
        if self._filled is None or self._filled[0] is not self.index or self._filled[1].shape[2] < held:
            room = held - self.index.shape[-1] + 256
            index = self.index if self.uneven else self.index[:, :1]
            self._filled = (self.index, torch.nn.functional.pad(index >= 0, (0, room), value=True))
        return self._filled[1][..., :held]

    def keep(self, mask: Tensor, visible: Tensor | None = None) -> Compaction | None:
        """Evict every slot where `mask` (bool, (batch, 1 | kv_heads, slots)) is False; their memory is freed.

        visible: bool (batch, slots), slots that hold a token that may be attended to, None for all; where nothing else
        would go, what is not visible stays, too. Returns which entries stayed, or None when nothing went.
        """
        index = self.full_index(mask.shape[0], mask.device)
        present = index >= 0 if visible is None else (index >= 0) & visible.unsqueeze(1)
        assert self.keys is not None and self.values is not None
        present = present.expand(-1, max(mask.shape[1], index.shape[1]), -1)
        choice = compact(mask & present, present)
        if choice is None:
            return None
        self.shared.pruned = True
        self.index = torch.where(choice.real, index.expand_as(present).gather(-1, choice.source), -1)
        self.ragged, self.uneven = choice.ragged, choice.uneven
        self.keys, self.values = (gather_entries(held, choice.source) for held in (self.keys, self.values))
        if self.memory is not None:
            self.memory = self.memory.moved(choice, held=present.shape[-1])
        return choice

    def merge(self, into: Tensor) -> None:
        """Replace keys and values by means. into: (batch, 1 | kv_heads, slots), the slot that each slot joins."""
        assert self.keys is not None and self.values is not None
        into = into.expand(-1, self.keys.shape[1], -1)
        parts = torch.zeros(into.shape, dtype=torch.float32, device=into.device)
        parts = parts.scatter_add(2, into, torch.ones_like(parts))

        def mean(held: Tensor) -> Tensor:
            where = into.unsqueeze(-1).expand_as(held)
            total = torch.zeros(held.shape, dtype=torch.float32, device=held.device).scatter_add(2, where, held.float())
            joined = (total / parts.clamp(min=1).unsqueeze(-1)).to(held.dtype)
            return joined.where((parts > 1).unsqueeze(-1), held)

        self.keys, self.values = mean(self.keys), mean(self.values)

    def evict_slot(self, slot: int) -> None:
        """Evict one slot of every row and head."""
        assert self.keys is not None and self.values is not None
        index = self.full_index(self.keys.shape[0], self.keys.device)
        self.index = torch.cat([index[..., :slot], index[..., slot + 1 :]], dim=-1)
        self.keys = torch.cat([self.keys[:, :, :slot], self.keys[:, :, slot + 1 :]], dim=2)
        self.values = torch.cat([self.values[:, :, :slot], self.values[:, :, slot + 1 :]], dim=2)
        self.shared.pruned = True

    def slide(self, recorded: bool = False) -> None:
        """Behind a pass: forget what the window left behind. Of a pruned layer the last slots hold all that it still
        sees, and more; which of them count is for the mask to say. recorded: also what assisted decoding may want."""
        if self.sliding_window is None or (self.record_past and not recorded):
            return
        gone = self.physical - self.most
        if gone <= 0:
            return
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[:, :, gone:], self.values[:, :, gone:]
        if gone > 1:  # a prompt's: a view would hold on to all of it
            self.keys, self.values = self.keys.clone(), self.values.clone()
        index = self.index
        if index is not None:
            rest = gone < index.shape[-1]
            self.index = self.shared.once(lambda: index[..., gone:], index, key=(gone,)) if rest else None
            self.ragged, self.uneven = self.ragged and rest, self.uneven and rest

    # -- what transformers asks for, answered logically -------------------------------------------------------

    def get_seq_length(self) -> int:
        """Logical length."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical length with the coming queries, and offset 0; of what the window leaves where there is one."""
        return self.most + query_length, self.length - self.most

    def activate_past_recording(self) -> None:
        """Assisted decoding is about to take tokens back."""
        self.record_past = True

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.length, self.index, self.fixed_point, self.memory = 0, None, None, None
        self.ragged = self.uneven = False
        self.shared.pruned = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` logical positions (assisted decoding)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        if not tokens_to_remove or not self.is_initialized:
            self.slide(recorded=True)
            return
        if self.kind == "cross":
            raise UnsupportedError(
                "assisted decoding crops the image features of cross-attention layers too; generate without "
                "prompt_lookup_num_tokens or an assistant model"
            )
        if self.sliding_window is not None and not self.record_past and self.length >= self.sliding_window:
            raise UnsupportedError("what a window left behind cannot come back: start from a new cache")
        target = self.length + tokens_to_remove
        tail = self.physical - (self.index.shape[-1] if self.index is not None else 0)
        if -tokens_to_remove > tail:
            # The cut reaches into evicted territory: what is left of it may differ from row to row.
            assert self.keys is not None
            self.keep(self.full_index(self.keys.shape[0], self.keys.device) < target)
        else:
            super().crop(tokens_to_remove)
            if self.memory is not None:
                self.memory = self.memory.cropped(self.physical)
        self.length = target
        self.slide(recorded=True)

    def _reindex(self, change: Any) -> None:
        if self.index is not None:
            self.index = change(self.index)
        if self.memory is not None:
            self.memory = self.memory.follow(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._reindex(lambda index: index.index_select(0, beam_idx.to(index.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        super().batch_repeat_interleave(repeats)
        self._reindex(lambda index: index.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select samples."""
        super().batch_select_indices(indices)
        self._reindex(lambda index: index[indices.to(index.device)])
