"""One forward pass of a pruned model: which rows are alive, and what each place drops."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..methods.base import CacheMethod
from ..methods.tokens import ImageGroups, LayerTokens
from .attention import physical_mask
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
        self.text: Tensor | None = None
        self.guidance: Tensor | None = None
        self.rows: Rows | None = None
        self.pending: Tensor | None = None
        self.embeddings: tuple[Any, Any] | None = None
        self.stages: tuple[int, ...] = session.stages
        self.embedded: Tensor | None = None
        self.before: Tensor | None = None
        self.view: LayerTokens | None = None
        self.waiting: list[tuple[int, Tensor, LayerTokens]] = []
        self.evicted: set[int] = set()
        self.entered: dict[int, Tensor | None] = {}
        self.cross = CrossState(session.cross_method, session.features_per_image)
        self.hooks: list[Any] = []
        self.pixels: dict[str, Any] | None = None
        self.outer: Forward | None = None
        self.prompt: Tensor | None = None
        self.verifies = False

    def unhook(self) -> None:
        """Take the hooks off the layers."""
        for hook in self.hooks:
            hook.remove()

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
        is_image = self.ids.eq(self.session.image_token_id)
        self.groups, self.places = group_images(self.images, is_image)
        self.check_fixed()
        self.text = self._text(is_image)
        if any(image.keep is not None for image in self.images):
            keep = self.valid().clone()
            for image, (row, place) in zip(self.images, self.places, strict=True):
                if image.keep is not None:
                    keep[row, place] &= image.keep
            self.drop(keep)

    def _text(self, is_image: Tensor) -> Tensor | None:
        """(batch, t) text tokens after the start of the sample's first image, the last token among them; -1 padded."""
        if self.session.layer_method is None and self.session.cache_method is None:
            return None
        looks = (is_image.cumsum(1) > 0) & ~is_image & self.valid()
        looks = looks.scatter(1, self.last().unsqueeze(1), True)
        order = looks.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(looks.sum(1).max())]
        return torch.where(looks.gather(1, order), order, -1)

    def drop(self, keep: Tensor, stage: bool = False) -> None:
        """Let only the rows where `keep` (bool, (batch, q)) go on, from the next layer. stage: of a layer method."""
        # The last token must go on even if it is an image token: its row becomes the next token.
        keep = keep.scatter(1, self.last().unsqueeze(1), True) & self.valid()
        self.pending = keep
        groups = self.groups
        assert groups is not None and groups.centers is not None
        alive = groups.present & keep[groups.row.unsqueeze(1), groups.positions.clamp(min=0)]
        choice = compact(alive.unsqueeze(1), groups.present.unsqueeze(1))
        if choice is not None:
            left, real = choice.source[:, 0], choice.real[:, 0]
            count = real.sum(-1)
            self.groups = dataclasses.replace(
                groups,
                positions=torch.where(real, groups.positions.gather(1, left), -1),
                count=count,
                dropped=groups.dropped + (groups.count - count) if stage else groups.dropped,
                centers=gather_rows(groups.centers, left),
            )

    def enter(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """In front of a decoder layer: drop what leaves here, and shorten what comes beside the hidden states."""
        if self.groups is not None and self.stages:
            assert self.session.layer_method is not None
            if index == 0 and self.session.layer_method.uses_embeddings:
                self.embedded = hidden
            if index in self.stages:
                hidden = self._stage(index, hidden)
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
        self.before = hidden if self.groups is not None and index + 1 in self.stages else None
        if self.rows is None:
            return hidden, kwargs
        if self.embeddings is None or self.embeddings[0] is not kwargs["position_embeddings"]:
            full = kwargs["position_embeddings"]
            self.embeddings = (full, tuple(gather_rows(part, self.rows.source) for part in full))
        # Flash attention would read the gaps in the position ids as packed sequences.
        return hidden, {**kwargs, "position_embeddings": self.embeddings[1], "position_ids": None}

    def _stage(self, index: int, hidden: Tensor) -> Tensor:
        """Let the layer method choose which image tokens go on; returns the hidden states they go on with."""
        method, view, self.view = self.session.layer_method, self.view, None
        assert method is not None and view is not None and self.groups is not None
        embedded = self.embedded
        if embedded is not None and self.rows is not None:
            embedded = gather_rows(embedded, self.rows.source)
        tokens = dataclasses.replace(
            view, entered=self.before, left=hidden, embedded=embedded, stage=self.stages.index(index)
        )
        chosen = method.select(tokens)
        states = method.merge(tokens, chosen)
        if states is not None:
            # Padding points one past the end.
            at = torch.where(chosen, tokens.slots - tokens.past, hidden.shape[1])
            room = torch.nn.functional.pad(hidden, (0, 0, 0, 1))
            room[tokens.groups.row.unsqueeze(1), at] = states.to(hidden.dtype)
            hidden = room[:, :-1]
        gone = torch.zeros(self.ids.shape[0], self.queries + 1, dtype=torch.bool, device=hidden.device)
        positions = torch.where(self.groups.present, self.groups.positions, self.queries)
        gone[self.groups.row.unsqueeze(1), positions] = ~chosen
        self.drop(self._alive() & ~gone[:, :-1], stage=True)
        if index == self.stages[-1]:
            self.embedded = None
        return hidden

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
        ends = self.groups is not None and index + 1 in self.stages
        evicts = self.groups is not None and self._evicts(index, layer)
        if not (ends or evicts):
            self._note_rows(index)
            return kernel(module, query, key, value, mask, **kwargs)
        tokens = self._tokens(index, layer, query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5)
        if ends:
            self.view = tokens
        if evicts:
            tokens = dataclasses.replace(tokens, groups=dataclasses.replace(tokens.groups, dropped=0))
            if self._cached.sparse_attention:
                return self._attend_sparsely(index, tokens, kernel, module, query, key, value, mask, **kwargs)
        out = kernel(module, query, key, value, mask, **kwargs)
        self._note_rows(index)
        if evicts:
            scores = self._cached.score(tokens)
            if self._cached.needs_all_layers:
                # Queries and keys need not wait, too.
                rest = dataclasses.replace(tokens, query=query[:, :, :0].clone(), key=key[:, :, :0].clone())
                self.waiting.append((index, scores, rest))
            else:
                self._evict(index, scores, tokens, self._budget(scores, tokens))
        return out

    @property
    def _cached(self) -> CacheMethod:
        assert self.session.cache_method is not None
        return self.session.cache_method

    def _evicts(self, index: int, layer: PrunedLayer | None) -> bool:
        method = self.session.cache_method
        return method is not None and layer is not None and index >= method.first_layer()

    def _note_rows(self, index: int) -> None:
        if self.groups is not None:
            self.entered[index] = None if self.rows is None else self.rows.index

    def _alive(self) -> Tensor:
        """bool (batch, q): tokens of this forward that the current layer still computes."""
        if self.rows is None:
            return self.valid()
        alive = torch.zeros(self.ids.shape[0], self.queries + 1, dtype=torch.bool, device=self.ids.device)
        return alive.scatter(1, torch.where(self.rows.real, self.rows.source, self.queries), True)[:, :-1]

    def _tokens(self, index: int, layer: PrunedLayer | None, query: Tensor, key: Tensor, scaling: float) -> LayerTokens:
        """What this layer shows a method."""
        assert self.groups is not None and self.text is not None
        keys, width = key.shape[2], query.shape[2]
        row, positions, last, text = self.groups.row, self.groups.positions, self.last(), self.text
        if self.rows is not None:
            # Row of each logical position among the rows of this forward; -1 leads to -1.
            inverse = torch.full((self.ids.shape[0], self.queries + 2), -1, device=self.ids.device)
            where = torch.where(self.rows.real, self.rows.source + 1, self.queries + 1)
            inverse = inverse.scatter(1, where, torch.arange(width, device=self.ids.device).expand_as(where))
            inverse[:, 0] = -1
            positions = inverse[row.unsqueeze(1), positions + 1]
            last, text = inverse.gather(1, last.unsqueeze(1) + 1)[:, 0], inverse.gather(1, text + 1)
        return LayerTokens(
            groups=self.groups,
            slots=torch.where(positions < 0, -1, positions + keys - width),
            query=query,
            key=key,
            scaling=scaling,
            visible=self.visible(layer, keys),
            last=last,
            text=text,
            layer=index,
            depth=len(self.session.kinds),
            guidance=self._guidance(),
        )

    def _guidance(self) -> Tensor | None:
        if self.guidance is None or self.groups is None:
            return None
        at = (self.groups.positions + self.past).clamp(min=0)
        return self.guidance[self.groups.row.unsqueeze(1), at].masked_fill(~self.groups.present, -torch.inf)

    def _budget(self, scores: Tensor, tokens: LayerTokens) -> Tensor:
        """(groups,) what the images of one layer may keep, for methods that do not compare layers."""
        return self._cached.budgets(self._cached.statistics(scores, tokens.groups).unsqueeze(0), tokens.groups)[0]

    def _stays(self, scores: Tensor, tokens: LayerTokens, budget: Tensor, held: int) -> tuple[Tensor, Tensor]:
        """Which image tokens stay, (groups, heads, n), and which of all the slots, (batch, heads, slots)."""
        stays = self._cached.select(scores, budget)
        heads, groups = stays.shape[1], tokens.groups
        mask = torch.ones(self.ids.shape[0], heads, held + 1, dtype=torch.bool, device=self.ids.device)
        if tokens.visible is not None:
            mask[..., :-1] &= tokens.visible.unsqueeze(1)
        head = torch.arange(heads, device=mask.device)[None, :, None].expand_as(stays)
        # Padding points one past the end.
        slots = torch.where(tokens.slots < 0, held, tokens.slots).unsqueeze(1).expand_as(stays)
        mask[groups.row[:, None, None].expand_as(stays), head, slots] = stays
        return stays, mask[..., :-1]

    def _evict(self, index: int, scores: Tensor, tokens: LayerTokens, budget: Tensor) -> None:
        layer = self.layer(index)
        assert layer is not None
        stays, mask = self._stays(scores, tokens, budget, layer.physical)
        into = self._cached.merge(stays, tokens.groups)
        if into is not None:
            layer.merge(self._joins(into, tokens.slots, tokens.groups, layer.physical))
        distance = self._cached.decode_distance
        # Where decoding evicts, too, rows must be aligned: padding goes even if nothing else does.
        if layer.keep(mask, tokens.visible if distance is None else None) is not None:
            self.evicted.add(index)
        if distance is not None:
            layer.fixed_point = layer.physical - distance

    def _joins(self, into: Tensor, slots: Tensor, groups: ImageGroups, held: int) -> Tensor:
        """The slot that every slot joins, (batch, heads, slots), from what every image token joins."""
        heads, device = into.shape[1], into.device
        joins = torch.arange(held + 1, device=device).expand(self.ids.shape[0], heads, -1).clone()
        spots = slots.unsqueeze(1).expand_as(into)
        target = spots.gather(-1, into)
        at = torch.where(spots < 0, held, spots)
        head = torch.arange(heads, device=device)[None, :, None].expand_as(into)
        joins[groups.row[:, None, None].expand_as(into), head, at] = torch.where(spots < 0, held, target)
        return joins[..., :-1]

    def _attend_sparsely(
        self,
        index: int,
        tokens: LayerTokens,
        kernel: Any,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Evict first; then only the rows whose entries stay attend, and the attention of the others is zero."""
        layer = self.layer(index)
        assert layer is not None
        scores, width = self._cached.score(tokens), query.shape[2]
        _, stay = self._stays(scores, tokens, self._budget(scores, tokens), layer.physical)
        # The last token must attend even if it is an image token: its row becomes the next token.
        stay = stay.scatter(2, (tokens.last + tokens.past)[:, None, None].expand(-1, stay.shape[1], 1), True)
        choice = layer.keep(stay[:, :1], tokens.visible)
        if choice is None:
            self._note_rows(index)
            return kernel(module, query, key, value, mask, **kwargs)
        if tokens.past:
            choice = compact(stay[:, :1, tokens.past :], torch.ones_like(stay[:, :1, tokens.past :]))
            assert choice is not None
        source, real = choice.source[:, 0], choice.real[:, 0]
        logical = source if self.rows is None else self.rows.source.gather(1, source)
        self.entered[index] = torch.where(real, logical, -1)
        rows = source[:, None, :, None]
        picked = query.gather(2, rows.expand(-1, query.shape[1], -1, query.shape[3]))
        implementation = module.config._attn_implementation
        filled = self.visible(layer, layer.physical)
        mask = physical_mask(implementation, rows.shape[2], layer.physical, filled, query.dtype, query)
        kwargs = {**kwargs, "position_ids": None} if "position_ids" in kwargs else kwargs
        out, weights = kernel(module, picked, layer.keys, layer.values, mask, **kwargs)
        out = out.masked_fill(~real[..., None, None], 0)
        full = out.new_zeros(out.shape[0], width, *out.shape[2:])
        return full.scatter_add(1, source[..., None, None].expand_as(out), out), weights

    def finish(self) -> None:
        """Behind the base model: evict what had to wait for all layers, and what later masks hide."""
        if self.waiting:
            statistics = torch.stack([self._cached.statistics(scores, t.groups) for _, scores, t in self.waiting])
            for i, (index, scores, tokens) in enumerate(self.waiting):
                self._evict(index, scores, tokens, self._cached.budgets(statistics, tokens.groups)[i])
        if self.past:
            self.evict_masked()
            if self.queries == 1:
                self._evict_fixed()

    def _evict_fixed(self) -> None:
        method = self.session.cache_method
        if method is None or method.decode_distance is None or self.cache is None:
            return
        for layer in self.cache.layers:
            if layer.fixed_point is None:
                continue
            if layer.fixed_point < 0:  # the prompt was shorter than the distance: wait until as much is held
                layer.fixed_point += 1
            elif layer.fixed_point < layer.physical - 1:
                layer.evict_slot(layer.fixed_point)

    def check_fixed(self) -> None:
        """Refuse what moves rows against each other where decoding evicts the same slot in all of them."""
        method = self.session.cache_method
        if method is None or method.decode_distance is None or self.cache is None:
            return
        way_out = f"use {method.name} with decode_distance=None, or one sample at a time"
        held = any(layer.fixed_point is not None for layer in self.cache.layers)
        if self.images and len({row for row, _ in self.places}) < self.ids.shape[0]:
            raise UnsupportedError(f"{method.name} evicts while decoding, and not all samples have an image: {way_out}")
        if held and not self.images and self.queries > 1 and not bool(self.valid().all()):
            raise UnsupportedError(f"{method.name} evicts while decoding, and this turn is padded: {way_out}")

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
