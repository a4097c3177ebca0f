"""In the steps of decoding: each reads a part of the KV cache, and another one the next; nothing is evicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...methods.base import CacheMethod, Method
from ...methods.stepwise import DecodeMethod
from ..attention import Attention, Output, Run
from ..cache import PrunedLayer
from ..devices import on
from ..fixtures import Fixtures
from ..forward import Forward
from ..generation import refuse_assisted
from ..memory import Memory
from ..reading import Part, groups_of, received_by_all
from ..report import Decoding, Outcome, PruneReport
from ..scores import laid_out
from ..target import Target
from .place import Action, Place


class DecodePlace(Place):
    """The attention of single new tokens under a method."""

    def __init__(self, target: Target, method: DecodeMethod, outcome: Outcome) -> None:
        super().__init__(target, outcome)
        self.method = method

    @classmethod
    def of(cls, target: Target, methods: Sequence[Method], outcome: Outcome) -> Place | None:
        method = next((m for m in methods if isinstance(m, DecodeMethod)), None)
        return None if method is None else cls(target, method, outcome)

    @classmethod
    def check(cls, target: Target, methods: Sequence[Method]) -> None:
        depth = len(target.kinds)
        for method in methods:
            if not isinstance(method, DecodeMethod):
                continue
            if method.dense_layers >= depth:
                raise ValueError(
                    f"{method.name}: dense_layers must be in [0, {depth - 1}] for this model, got {method.dense_layers}"
                )
            target.check_readable(method.name, range(method.dense_layers, depth))
            for other in methods:
                if isinstance(other, CacheMethod):
                    raise UnsupportedError(
                        f"{other.name} leaves each head other entries of the KV cache, and {method.name} chooses among "
                        "those of all heads: use one of them, or methods before or inside the LLM"
                    )

    def install(self, fixtures: Fixtures) -> None:
        refuse_assisted(
            fixtures,
            self.target.model,
            f"{self.method.name} chooses for one decoding step at a time, and assisted decoding takes several at once: "
            "generate without prompt_lookup_num_tokens or an assistant model",
        )

    @property
    def reads_prompt(self) -> bool:
        return True

    def act(self, forward: Forward) -> Action | None:
        return None if forward.cache is None else DecodeAction(self, forward)

    def tell(self, report: PruneReport) -> None:
        report.decoding = Decoding()


class DecodeAction(Action):
    """What one pass remembers, or reads. chosen, scores: with record, by layer, as `Decoding` has them."""

    def __init__(self, place: DecodePlace, forward: Forward) -> None:
        self.place, self.method, self.forward = place, place.method, forward
        self.decodes = forward.queries == 1 and bool(forward.past) and not forward.brings_images
        self.counted: set[int] = set()  # layers of the cache, by id
        self._real: dict[int, Tensor] = {}  # tokens among the last so many, that are no padding
        self.read: list[Tensor] = []
        self.held: list[Tensor] = []
        self.chosen: dict[int, Tensor] = {}
        self.scores: dict[int, Tensor] = {}

    def attends(self, attention: Attention) -> bool:
        layer = attention.layer
        # Of a window there is little to choose.
        reads = self.forward.target.readable[attention.index]
        if layer is None or not reads or attention.index < self.method.dense_layers:
            return False
        return self.forward.groups is not None or layer.memory is not None

    def attend(self, attention: Attention, run: Run) -> Output:
        layer = attention.layer
        assert layer is not None
        attention.check_heads(self.method.name)
        if self.decodes:
            return self._step(attention, layer, run)
        out = run(attention)
        layer.memory = self._observed(attention, layer)
        return out

    def finish(self) -> None:
        report = self.place.outcome.report
        if not self.counted or report is None or report.decoding is None:
            return
        home, decoding = self.forward.home, report.decoding
        # Layers where nothing is chosen read all that they hold.
        rest = [self._entries(layer) for layer in self.forward.held if id(layer) not in self.counted]
        decoding.add(sum(on(home, [*self.read, *rest])), sum(on(home, [*self.held, *rest])))
        if report.records:
            decoding.chosen.append(on(home, self.chosen))
            decoding.scores.update(on(home, self.scores))
            if decoding.scores:
                report.scores[self.method.name] = decoding.scores

    def _entries(self, layer: PrunedLayer) -> Tensor | int:
        """How many entries a layer holds that are no padding, over all samples and heads; a number on the device."""
        assert layer.keys is not None
        batch, heads, held = layer.keys.shape[:3]
        visible, mask = self.forward.visible(layer, held), self.forward.arguments.get("attention_mask")
        if visible is not None:
            return visible.sum() * (heads // visible.shape[1])
        if layer.index is not None or not isinstance(mask, Tensor) or mask.ndim != 2:
            return batch * heads * held
        if held not in self._real:
            self._real[held] = (mask[:, -held:] > 0).sum()
        return self._real[held] * heads

    # -- behind a prefill -------------------------------------------------------------------------------------

    def _observed(self, attention: Attention, layer: PrunedLayer) -> Memory:
        """The memory of all images of the cache, behind a turn."""
        old, batch = layer.memory, len(self.forward.ids)
        parts = [] if old is None else [(old.slots, old.budget, old.cells)]
        if self.forward.groups is not None:
            parts.append(self._new(attention))
        most = max(slots.shape[2] for slots, *_ in parts)

        def joined(tensors: Sequence[Tensor], fill: int) -> Tensor:
            room = [(*(0, 0) * (t.ndim - 3), 0, most - t.shape[2]) for t in tensors]
            return torch.cat([torch.nn.functional.pad(t, r, value=fill) for t, r in zip(tensors, room, strict=True)], 1)

        slots, cells = joined([p[0] for p in parts], -1), joined([p[2] for p in parts], 0)
        budget = torch.cat([p[1] for p in parts], 1)
        tokens = attention.tokens_of(groups_of(slots, cells), slots.flatten(0, 1))
        known = {} if old is None or self.forward.groups is not None else old.notes
        notes = self.method.observe(tokens, {name: note.flatten(0, 1) for name, note in known.items()})
        notes = {name: note.unflatten(0, (batch, -1)) for name, note in notes.items()}

        held = attention.key.shape[2]
        others = ~tokens.image_mask()
        if tokens.visible is not None:
            others &= tokens.visible
        count = others.sum(1)
        uneven = (count != count[0]).any() | (budget != budget.flatten()[0]).any()
        width, largest, ragged = torch.stack([count.max(), budget.max(), uneven.to(count.dtype)]).tolist()
        order = others.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        order = torch.where(others.gather(1, order), order, -1)
        return Memory(slots, budget, order, cells, notes, held, largest, bool(ragged))

    def _new(self, attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
        """The images of this pass by sample: slots (batch, images, n), budgets (batch, images), cells."""
        tokens = attention.tokens
        # Stages of a method inside the LLM are none of this one's business.
        groups = dataclasses.replace(tokens.groups, dropped=0)
        assert groups.cells is not None
        number, most = self._numbers

        def by_sample(values: Tensor, fill: int) -> Tensor:
            out = values.new_full((len(self.forward.ids), most, *values.shape[1:]), fill)
            return out.index_put((groups.row, number.to(groups.row.device)), values)

        return by_sample(tokens.slots, -1), by_sample(self.method.budget(groups), 0), by_sample(groups.cells, 0)

    @cached_property
    def _numbers(self) -> tuple[Tensor, int]:
        """(groups,) which of its sample's images each image of this pass is, and how many the sample with most has."""
        assert self.forward.groups is not None
        rows = torch.nn.functional.one_hot(self.forward.groups.row, len(self.forward.ids))
        return (rows.cumsum(0) * rows).sum(1) - 1, int(rows.sum(0).max())

    # -- a step -----------------------------------------------------------------------------------------------

    def _step(self, attention: Attention, layer: PrunedLayer, run: Run) -> Output:
        memory, refresh, batch = layer.memory, self.method.refresh, len(attention.key)
        assert memory is not None
        memory.steps += 1
        notes = {name: note.flatten(0, 1) for name, note in memory.notes.items()}
        if refresh is not None and memory.steps % refresh == 0:
            part, out = None, run(attention)
        else:
            query = attention.query[:, :, 0].repeat_interleave(memory.slots.shape[1], 0)
            scores = self.method.score(notes, query, attention.scaling)
            scores = scores.masked_fill(memory.missing, -torch.inf)
            self._note_scores(attention.index, layer, memory, scores)
            part = Part.made(self.method.select(scores, memory.most), memory, attention.key.shape[2])
            attention = part.of(attention)
            out = run(attention)
        if self.method.remembers:
            received = received_by_all(attention, memory) if part is None else part.received(attention)
            notes = self.method.remember(notes, *received)
            memory.notes = {name: note.unflatten(0, (batch, -1)) for name, note in notes.items()}
        self._count(attention.index, layer, memory, part)
        return out

    def _note_scores(self, index: int, layer: PrunedLayer, memory: Memory, scores: Tensor) -> None:
        """For the report: what each image token counted for in this step. scores: (batch * images, kv_heads, n)."""
        slots = memory.slots
        if self.place.outcome.records:
            logical = layer.full_index(len(slots), slots.device)[:, 0].gather(1, slots.clamp(min=0).flatten(1))
            at = torch.where(slots < 0, -1, logical.view_as(slots)).flatten(0, 1)
            row = torch.arange(len(slots), device=slots.device).repeat_interleave(slots.shape[1])
            self.scores[index] = laid_out(scores, at, row, (len(slots), layer.length))

    def _count(self, index: int, layer: PrunedLayer, memory: Memory, part: Part | None) -> None:
        """Note for the report what was read of the layer of this index."""
        assert layer.keys is not None
        batch, heads, held = layer.keys.shape[:3]
        later = batch * (held - memory.end)
        self.counted.add(id(layer))
        self.held.append(heads * (memory.before + later))
        self.read.append(heads * ((memory.before if part is None else memory.chosen) + later))
        report = self.place.outcome.report
        if report is None or not report.records:
            return
        if part is None:
            slots = torch.arange(held, device=layer.keys.device).where(memory.visible(held), -1).unsqueeze(1)
        else:
            slots = torch.where(part.filled.unsqueeze(1), part.index, -1)
        logical = layer.full_index(batch, slots.device)[:, :1].expand(-1, slots.shape[1], -1)
        at = torch.where(slots < 0, layer.length, logical.gather(2, slots.clamp(min=0)))
        mask = torch.zeros(*slots.shape[:2], layer.length + 1, dtype=torch.bool, device=slots.device)
        self.chosen[index] = mask.scatter(2, at, True)[..., :-1]
