"""The part of a layer's entries that one decoding step reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods.tokens import ImageGroups
from .attention import Attention
from .memory import Memory
from .rows import gather_entries


@dataclass(frozen=True)
class Part:
    """The entries of one layer that a step reads.

    picked: (batch * images, kv_heads, most) tokens of each image, the best first. real: bool (batch * images, most),
    False beyond an image's budget. index: (batch, kv_heads, width) entries of the layer: what is always read, the
    picked tokens image by image, and what came since. filled: bool (batch, width), False where there is none.
    """

    picked: Tensor
    real: Tensor
    index: Tensor
    filled: Tensor
    memory: Memory

    @classmethod
    def made(cls, picked: Tensor, memory: Memory, held: int) -> Part:
        """Those entries, of `held`, that the picked tokens and everything that is always read come to."""
        batch, device, heads = len(memory.slots), picked.device, picked.shape[1]
        slots = memory.slots.flatten(0, 1).unsqueeze(1)
        real = memory.real
        chosen = slots.expand(-1, heads, -1).gather(2, picked).unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)
        newer = torch.arange(memory.end, held, device=device).expand(batch, heads, -1)
        index = torch.cat([memory.others.unsqueeze(1).expand(-1, heads, -1), chosen, newer], 2).clamp(min=0)
        filled = torch.cat([memory.filled, torch.ones_like(newer[:, 0], dtype=torch.bool)], 1)
        return cls(picked, real, index, filled, memory)

    def of(self, attention: Attention) -> Attention:
        """The same attention over these entries only."""
        key, value = (gather_entries(tensor, self.index) for tensor in (attention.key, attention.value))
        return attention.over(key, value, self.filled.unsqueeze(1) if self.memory.ragged else None)

    def received(self, attention: Attention) -> tuple[Tensor, Tensor]:
        """What each image token got in this step, and which were attended to: (batch * images, kv_heads, n).

        attention: over these entries, what `of` returned.
        """
        query = attention.query[:, :, 0].unflatten(1, (attention.key.shape[1], -1))
        logits = ((query * attention.scaling) @ attention.key.transpose(-1, -2)).float()
        weights = logits.masked_fill(~self.filled[:, None, None], -torch.inf).softmax(-1).amax(2)
        first, images = self.memory.others.shape[1], self.memory.slots.shape[1]
        own = weights[..., first : first + images * self.memory.most].unflatten(2, (images, -1)).transpose(1, 2)
        own = own.flatten(0, 1) * self.real.unsqueeze(1)
        room = own.new_zeros(*own.shape[:2], self.memory.slots.shape[2])
        real = self.real.unsqueeze(1).expand_as(own)
        return room.scatter(2, self.picked, own), room.bool().scatter(2, self.picked, real)


def received_by_all(attention: Attention, memory: Memory) -> tuple[Tensor, Tensor]:
    """What each image token gets in a step that reads everything, as `Part.received` says it."""
    slots = memory.slots.flatten(0, 1)
    tokens = attention.tokens_of(groups_of(memory.slots, memory.cells), slots)
    # A forward of one token has no mask to tell padding by.
    tokens = dataclasses.replace(tokens, visible=memory.visible(attention.key.shape[2]))
    received = tokens.last_attention().clamp(min=0).unflatten(1, (attention.key.shape[1], -1)).amax(2)
    return received, (slots >= 0).unsqueeze(1).expand_as(received)


def groups_of(slots: Tensor, cells: Tensor) -> ImageGroups:
    """All images of a cache as groups. slots: (batch, images, n); cells: (batch, images, n, 3)."""
    row = torch.arange(len(slots), device=slots.device).repeat_interleave(slots.shape[1])
    count = (slots.flatten(0, 1) >= 0).sum(1)
    return ImageGroups(slots.flatten(0, 1), row, count, torch.zeros_like(count), cells=cells.flatten(0, 1))
