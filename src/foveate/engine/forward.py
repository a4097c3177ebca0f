"""One forward pass of a pruned model: which rows are alive, and what each place drops."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..methods.base import ImageGroups
from .attention import physical_mask, row_attention
from .cache import PrunedLayer
from .compact import Rows, compact, gather_rows
from .cross import CrossState
from .errors import UnsupportedError
from .images import EncodedImage, group_images

if TYPE_CHECKING:
    from .session import Pruned


class Forward:
    """State of one forward pass of a pruned model; lives between the base model's hooks."""

    def __init__(self, session: Pruned, cache: Any, input_ids: Tensor, mask: Tensor | None) -> None:
        self.session = session
        self.cache = cache
        self.ids = input_ids
        self.queries = input_ids.shape[1]
        self.past = cache.layers[session.text_layers[0]].length if cache is not None else 0
        self.layers = frozenset(map(id, cache.layers)) if cache is not None else frozenset()
        # A single new token is never padding, and what earlier masks hid is gone from pruned layers.
        decodes = self.past and self.queries == 1
        self.mask = None if mask is None or decodes or bool(mask.all()) else mask.bool()
        self.features: Sequence[Tensor] = ()
        self.images: list[EncodedImage] = []
        self.places: list[tuple[int, Tensor]] = []
        self.groups: ImageGroups | None = None
        self.rows: Rows | None = None
        self.pending: Tensor | None = None
        self.embeddings: tuple[Any, Any] | None = None
        self.waiting: list[tuple[int, Tensor, Tensor, Tensor | None, ImageGroups]] = []
        self.evicted: set[int] = set()
        self.entered: dict[int, Tensor | None] = {}
        self.cross = CrossState(session.cross_method, session.features_per_image)
        self.pixels: dict[str, Any] | None = None
        self.outer: Forward | None = None
        self.prompt: Tensor | None = None
        self.verifies = False
        if self.past and self.mask is not None:
            self.evict_masked()

    # -- questions of the cache layers ------------------------------------------------------------------------

    def owns(self, layer: PrunedLayer) -> bool:
        """Whether `layer` belongs to this forward's cache."""
        return id(layer) in self.layers

    def incoming(self, kind: Literal["self", "cross"], states: int) -> tuple[int, Tensor | None, bool]:
        """What `states` new entries are: logical positions that arrive, which ones where some were dropped
        (-1: fillers), and whether there are fillers."""
        rows, tokens = (self.rows, self.queries) if kind == "self" else (self.cross.rows, self.cross.tokens)
        return (states, None, False) if rows is None else (tokens, rows.index, rows.ragged)

    def layer(self, index: int) -> PrunedLayer | None:
        """The cache layer of a decoder layer."""
        return None if self.cache is None else self.cache.layers[index]

    # -- rows -------------------------------------------------------------------------------------------------

    def valid(self) -> Tensor:
        """bool (batch, q): tokens of this forward that are no padding."""
        if self.mask is None:
            return torch.ones_like(self.ids, dtype=torch.bool)
        return self.mask[:, self.past :]

    def last(self) -> Tensor:
        """(batch,) index of each sample's last token in this forward."""
        steps = torch.arange(self.queries, device=self.ids.device)
        return (self.valid() * steps).argmax(-1)

    def begin(self) -> None:
        """Before layer 0: find the images, and drop what was chosen between encoder and LLM."""
        if not self.features:
            return
        try:
            self.images = [feature._foveate for feature in self.features]  # type: ignore[attr-defined]
        except AttributeError:
            raise UnsupportedError(
                "these image features were not encoded while the model is pruned (precomputed features, or a chunked "
                "prefill): pass pixel values, and generate without prefill_chunk_size"
            ) from None
        self.groups, self.places = group_images(self.images, self.ids.eq(self.session.image_token_id))
        if any(image.keep is not None for image in self.images):
            keep = self.valid().clone()
            for image, (row, place) in zip(self.images, self.places, strict=True):
                if image.keep is not None:
                    keep[row, place] &= image.keep
            self.drop(keep)

    def drop(self, keep: Tensor) -> None:
        """Let only the rows where `keep` (bool, (batch, q)) go on, from the next layer."""
        # The last token must go on even if it is an image token: its row becomes the next token.
        keep = keep.scatter(1, self.last().unsqueeze(1), True) & self.valid()
        self.pending = keep
        assert self.groups is not None
        positions, count = self.groups.positions, self.groups.count
        alive = (positions >= 0) & keep[self.groups.row.unsqueeze(1), positions.clamp(min=0)]
        choice = compact(alive.unsqueeze(1), (positions >= 0).unsqueeze(1))
        if choice is not None:
            left, real = choice.source[:, 0], choice.real[:, 0]
            self.groups = dataclasses.replace(
                self.groups,
                positions=torch.where(real, positions.gather(1, left), -1),
                count=torch.minimum(real.sum(-1), count),
            )

    def enter(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """In front of a decoder layer: drop the pending rows, and shorten what comes beside the hidden states."""
        if self.pending is not None:
            old, self.pending = self.pending, None
            mask = old if self.rows is None else old.gather(1, self.rows.source) & self.rows.real
            present = self.valid() if self.rows is None else self.rows.real
            choice = compact(mask.unsqueeze(1), present.unsqueeze(1))
            if choice is not None:
                source, real = choice.source[:, 0], choice.real[:, 0]
                hidden = gather_rows(hidden, source)
                kept = source if self.rows is None else self.rows.source.gather(1, source)
                self.rows, self.embeddings = Rows(kept, real, choice.ragged), None
        if self.rows is None:
            return hidden, kwargs
        if self.embeddings is None or self.embeddings[0] is not kwargs["position_embeddings"]:
            full = kwargs["position_embeddings"]
            self.embeddings = (full, tuple(gather_rows(part, self.rows.source) for part in full))
        # Flash attention would read the gaps in the position ids as packed sequences.
        return hidden, {**kwargs, "position_embeddings": self.embeddings[1], "position_ids": None}

    def leave(self, hidden: Tensor) -> Tensor:
        """Behind the last layer: back to the logical length, zeros where rows were dropped."""
        if self.rows is None:
            return hidden
        rows = self.rows
        full = hidden.new_zeros(hidden.shape[0], self.queries, hidden.shape[-1])
        source = rows.source.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return full.scatter(1, source, hidden.masked_fill(~rows.real.unsqueeze(-1), 0) if rows.ragged else hidden)

    # -- attention --------------------------------------------------------------------------------------------

    def visible(self, layer: PrunedLayer | None, keys: int) -> Tensor | None:
        """bool (batch, keys): slots that hold a token that may be attended to; None when all do."""
        if layer is not None and layer.index is not None:
            filled = layer.filled()
            if self.mask is not None:
                index = layer.full_index(self.ids.shape[0], self.ids.device)[:, 0]
                tokens = self.mask.gather(1, index.clamp(min=0)) & (index >= 0)
                # Only text can be masked inside a pruned layer, and text has the same slots in every head.
                filled = tokens if filled is None else filled & tokens
            return filled
        if self.rows is not None:
            return self.rows.real if self.rows.ragged else None
        return None if self.mask is None else self.mask[:, :keys]

    def attend_self(
        self, index: int, kernel: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of one decoder layer over its physical rows and slots."""
        layer = self.layer(index)
        if self.rows is not None or (layer is not None and layer.index is not None):
            filled = self.visible(layer, key.shape[2])
            implementation = module.config._attn_implementation
            mask = physical_mask(implementation, query.shape[2], key.shape[2], filled, query.dtype, query)
        out = kernel(module, query, key, value, mask, **kwargs)
        if self.groups is not None:
            self.entered[index] = None if self.rows is None else self.rows.index
            self._after_self(index, layer, query, key, kwargs.get("scaling"))
        return out

    def _after_self(
        self, index: int, layer: PrunedLayer | None, query: Tensor, key: Tensor, scaling: float | None
    ) -> None:
        stage, cached = self.session.layer_method, self.session.cache_method
        ends = stage is not None and stage.layer - 1 == index
        evicts = cached is not None and index >= cached.first_layer() and layer is not None
        if not (ends or evicts):
            return
        scores, slots = self._image_attention(layer, query, key, scaling or query.shape[-1] ** -0.5)
        assert self.groups is not None
        if evicts:
            assert cached is not None
            heads = key.shape[1]
            per_head = scores.reshape(scores.shape[0], heads, -1, scores.shape[-1]).mean(2)
            visible = self.visible(layer, key.shape[2])
            if cached.needs_all_layers:
                self.waiting.append((index, per_head, slots, visible, self.groups))
            else:
                self._evict(index, per_head, slots, visible, cached.budgets(self._mass([per_head]), self.groups)[0])
        if ends:
            assert stage is not None
            chosen = stage.select(scores, self.groups)
            keep = self.valid().clone()
            rows, positions = self.groups.row.unsqueeze(1), self.groups.positions
            flat = torch.zeros(keep.shape[0], self.queries + 1, dtype=torch.bool, device=keep.device)
            # Padding points one past the end.
            flat[rows.expand_as(positions), torch.where(positions < 0, self.queries, positions)] = ~chosen
            self.drop(keep & ~flat[:, :-1] & self._alive())

    def _alive(self) -> Tensor:
        """bool (batch, q): tokens of this forward that the current layer still computes."""
        if self.rows is None:
            return self.valid()
        alive = torch.zeros(self.ids.shape[0], self.queries + 1, dtype=torch.bool, device=self.ids.device)
        return alive.scatter(1, torch.where(self.rows.real, self.rows.source, self.queries), True)[:, :-1]

    def _image_attention(
        self, layer: PrunedLayer | None, query: Tensor, key: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of the last prompt token on the images: (groups, heads, n), -inf at padding; and their slots."""
        assert self.groups is not None
        keys, width = key.shape[2], query.shape[2]
        positions, row = self.groups.positions, self.groups.row
        last = self.last()
        if self.rows is None:
            slots = positions
        else:
            # Slot of each logical position among the rows of this forward.
            inverse = torch.full((self.ids.shape[0], self.queries + 1), -1, device=self.ids.device)
            where = torch.where(self.rows.real, self.rows.source, self.queries)
            steps = torch.arange(width, device=self.ids.device).expand_as(where)
            inverse = inverse.scatter(1, where, steps)
            slots = inverse[row.unsqueeze(1), positions.clamp(min=0)]
            last = inverse.gather(1, last.unsqueeze(1))[:, 0]
        slots = torch.where(positions < 0, -1, slots + keys - width)
        picked = query.gather(2, last.view(-1, 1, 1, 1).expand(-1, query.shape[1], 1, query.shape[3]))
        attention = row_attention(picked, key, scaling, self.visible(layer, keys))[row]
        scores = attention.gather(2, slots.clamp(min=0).unsqueeze(1).expand(-1, attention.shape[1], -1))
        return scores.masked_fill((slots < 0).unsqueeze(1), -torch.inf), slots

    def _mass(self, attention: list[Tensor]) -> Tensor:
        """(layers, batch) attention on all image tokens, mean over heads."""
        assert self.groups is not None
        per_image = torch.stack([a.clamp(min=0).sum(-1).mean(1) for a in attention])
        mass = per_image.new_zeros(len(attention), self.ids.shape[0])
        return mass.index_add(1, self.groups.row, per_image)

    def _evict(self, index: int, attention: Tensor, slots: Tensor, visible: Tensor | None, budget: Tensor) -> None:
        assert self.session.cache_method is not None and self.groups is not None
        layer = self.layer(index)
        assert layer is not None
        stays = self.session.cache_method.select(attention, budget)
        heads, held = attention.shape[1], layer.physical
        mask = torch.ones(self.ids.shape[0], heads, held + 1, dtype=torch.bool, device=self.ids.device)
        if visible is not None:
            mask[..., :-1] &= visible.unsqueeze(1)
        row = self.groups.row[:, None, None].expand_as(stays)
        head = torch.arange(heads, device=mask.device)[None, :, None].expand_as(stays)
        # Padding points one past the end.
        mask[row, head, torch.where(slots < 0, held, slots).unsqueeze(1).expand_as(stays)] = stays
        if self._drops_image(layer, mask[..., :-1], visible) and layer.keep(mask[..., :-1]):
            self.evicted.add(index)

    def _drops_image(self, layer: PrunedLayer, mask: Tensor, visible: Tensor | None) -> bool:
        """Whether more than padding would go: a layer that keeps every token is left exactly as it was."""
        return layer.index is not None or visible is None or bool((visible.unsqueeze(1) & ~mask).any())

    def finish(self) -> None:
        """Behind the base model: evict what had to wait for all layers, and what later masks hide."""
        cached = self.session.cache_method
        if self.waiting and cached is not None:
            mass = self._mass([attention for _, attention, *_ in self.waiting])
            for i, (index, attention, slots, visible, groups) in enumerate(self.waiting):
                self._evict(index, attention, slots, visible, cached.budgets(mass, groups)[i])
        if self.past:
            self.evict_masked()

    def evict_masked(self) -> None:
        """Free entries of pruned layers that the 2-D mask hides, so that what is held is always attended to."""
        if self.mask is None or self.cache is None:
            return
        for layer in self.cache.layers:
            if layer.kind == "self" and layer.index is not None:
                index = layer.full_index(self.ids.shape[0], self.ids.device)
                hidden = self.mask.unsqueeze(1).expand(-1, index.shape[1], -1)
                known = torch.nn.functional.pad(hidden, (0, max(0, layer.length - hidden.shape[-1])), value=True)
                layer.keep(known.gather(-1, index.clamp(min=0)) & (index >= 0))

    def attend_cross(
        self, index: int, kernel: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Cross-attention of one decoder layer over the features that it holds."""
        layer = self.layer(index)
        if layer is not None and layer.index is not None:
            mask = self.cross.mask(layer, mask, query)
        out = kernel(module, query, key, value, mask, **kwargs)
        self.entered[index] = None if self.cross.rows is None else self.cross.rows.index
        if layer is not None and self.cross.trim(
            layer, query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5, mask
        ):
            self.evicted.add(index)
        return out
