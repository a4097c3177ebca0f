"""What a cache layer remembers of its images between decoding steps, and where their entries are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .rows import Compaction


@dataclass
class Memory:
    """All tensors are by sample, as the cache is, and follow its rows.

    slots: (batch, images, n) the entry of each image token, -1 where there is none. budget: (batch, images) tokens that
    a step reads. others: (batch, m) the entries beside them that stood here at the end of the turn, -1 at fillers.
    cells: (batch, images, n, 3) of the tokens. notes: what the method remembers, (batch, images, ...).
    end: entries there were then; what came later is read by every step. most: no budget is larger. ragged: whether any
    sample has fewer others, images or smaller budgets than another. steps: since the turn began.
    """

    slots: Tensor
    budget: Tensor
    others: Tensor
    cells: Tensor
    notes: dict[str, Tensor]
    end: int
    most: int
    ragged: bool
    steps: int = 0

    @cached_property
    def missing(self) -> Tensor:
        """bool (batch * images, 1, n): where an image has no token."""
        return (self.slots < 0).flatten(0, 1).unsqueeze(1)

    @cached_property
    def real(self) -> Tensor:
        """bool (batch * images, most): False beyond an image's budget."""
        return torch.arange(self.most, device=self.budget.device) < self.budget.flatten().unsqueeze(1)

    @cached_property
    def filled(self) -> Tensor:
        """bool (batch, m + images * most): of the others and then of so many tokens of each image, those there are."""
        return torch.cat([self.others >= 0, self.real.unflatten(0, (len(self.slots), -1)).flatten(1)], 1)

    @cached_property
    def before(self) -> Tensor:
        """How many entries stood here at the end of the turn, over all samples; a number on the device."""
        return (self.others >= 0).sum() + (self.slots >= 0).sum()

    @cached_property
    def chosen(self) -> Tensor:
        """How many of them a step reads."""
        return (self.others >= 0).sum() + self.budget.sum()

    def visible(self, held: int) -> Tensor:
        """bool (batch, held): entries that hold a token, of so many that there are."""
        known = torch.cat([self.others, self.slots.flatten(1)], 1)
        mask = torch.zeros(len(known), held + 1, dtype=torch.bool, device=known.device)
        mask = mask.scatter(1, torch.where(known < 0, held, known), True)[:, :-1]
        mask[:, self.end :] = True
        return mask

    def follow(self, change: Callable[[Tensor], Tensor]) -> Memory:
        """The same for other rows of the batch."""
        notes = {name: change(note) for name, note in self.notes.items()}
        slots, budget, others, cells = map(change, (self.slots, self.budget, self.others, self.cells))
        return dataclasses.replace(self, slots=slots, budget=budget, others=others, cells=cells, notes=notes)

    def moved(self, choice: Compaction, held: int) -> Memory:
        """The same behind an eviction from the layer, in which all heads lost the same entries.

        choice: what stayed. held: entries before.
        """
        source, real = choice.source[:, 0], choice.real[:, 0]
        place = torch.arange(source.shape[1], device=source.device).expand_as(source)
        now = torch.full((len(source), held + 2), -1, device=source.device)
        # One place more for fillers, and one for what is nowhere.
        now.scatter_(1, torch.where(real, source, held), place)
        now[:, held:] = -1
        newer = torch.arange(self.end, held, device=source.device).expand(len(source), -1)
        others = torch.cat([self.others, newer], 1)

        def new(slots: Tensor) -> Tensor:
            return now.gather(1, torch.where(slots < 0, held + 1, slots).flatten(1)).view_as(slots)

        return dataclasses.replace(
            self, slots=new(self.slots), others=new(others), end=source.shape[1], ragged=True
        ).checked()

    def cropped(self, held: int) -> Memory:
        """The same where entries from `held` on are gone."""
        if held >= self.end:
            return self
        slots, others = (places.where(places < held, -1) for places in (self.slots, self.others))
        return dataclasses.replace(self, slots=slots, others=others, end=held, ragged=True).checked()

    def checked(self) -> Memory:
        """The same, no image with a larger budget than it has tokens."""
        return dataclasses.replace(self, budget=torch.minimum(self.budget, (self.slots >= 0).sum(-1)))
