"""In the KV cache: entries of image tokens are evicted once a layer's prefill attention is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...methods.base import CacheMethod, Method
from ...methods.contract import check_mask
from ...methods.tokens import ImageGroups, LayerTokens
from ..attention import Attention, Output, Run
from ..cache import PrunedLayer
from ..devices import on
from ..fixtures import Fixtures
from ..forward import Forward
from ..generation import refuse_assisted
from ..masks import FLASH_HEADS
from ..report import Outcome
from ..rows import compact, gather_entries
from ..target import Target
from .place import Action, Call, Place


class CachePlace(Place):
    """The KV cache under a method."""

    def __init__(self, target: Target, method: CacheMethod, outcome: Outcome) -> None:
        super().__init__(target, outcome)
        self.method = method

    @classmethod
    def of(cls, target: Target, methods: Sequence[Method], outcome: Outcome) -> Place | None:
        method = next((m for m in methods if isinstance(m, CacheMethod)), None)
        return None if method is None else cls(target, method, outcome)

    @classmethod
    def check(cls, target: Target, methods: Sequence[Method]) -> None:
        depth = len(target.kinds)
        for method in methods:
            if not isinstance(method, CacheMethod):
                continue
            if method.first_layer() >= depth:
                raise ValueError(f"{method.name}: start_layer must be in [0, {depth - 1}] for this model")
            target.check_readable(method.name, range(method.first_layer(), depth))
            check_heads(target, method)

    def install(self, fixtures: Fixtures) -> None:
        if self.method.decode_distance is not None:
            # What a step evicted cannot come back when its guesses are taken back.
            refuse_assisted(
                fixtures,
                self.target.model,
                f"{self.method.name} evicts at every decoding step, and assisted decoding takes several at once: "
                "generate without prompt_lookup_num_tokens or an assistant model, or with decode_distance=None",
            )

    @property
    def reads_prompt(self) -> bool:
        return True

    def refuse(self, call: Call) -> None:
        check_heads(self.target, self.method)  # the attention may have been switched since

    def act(self, forward: Forward) -> Action | None:
        action = CacheAction(self, forward)
        if self.method.decode_distance is not None and not forward.brings_images:
            action.check_aligned()
        return action if forward.brings_images or self.method.decode_distance is not None else None


def check_heads(target: Target, method: CacheMethod) -> None:
    """Refuse heads that keep differently many tokens where no mask can say so."""
    if method.uneven_heads and "flash" in target.decoder.config._attn_implementation:
        raise UnsupportedError(f"{method.name} lets each head keep another number of tokens, and {FLASH_HEADS}")


class CacheAction(Action):
    """Evictions of one pass. waiting: layers whose budgets compare all of them, with scores and what was scored."""

    def __init__(self, place: CachePlace, forward: Forward) -> None:
        self.place, self.method, self.forward = place, place.method, forward
        self.waiting: list[tuple[int, Tensor, LayerTokens]] = []

    def begin(self) -> None:
        if self.method.decode_distance is not None:
            self.check_aligned()

    def check_aligned(self) -> None:
        """Refuse what moves rows against each other where decoding evicts the same slot in all of them."""
        forward, name = self.forward, self.method.name
        if forward.cache is None:
            return
        way_out = f"use {name} with decode_distance=None, or one sample at a time"
        held = any(layer.fixed_point is not None for layer in forward.held)
        if forward.images and len({row for row, _ in forward.places}) < forward.ids.shape[0]:
            raise UnsupportedError(f"{name} evicts while decoding, and not all samples have an image: {way_out}")
        if held and not forward.images and forward.queries > 1 and not bool(forward.valid().all()):
            raise UnsupportedError(f"{name} evicts while decoding, and this turn is padded: {way_out}")

    def attends(self, attention: Attention) -> bool:
        held = self.forward.groups is not None and attention.layer is not None
        # A window forgets by itself.
        reads = self.forward.target.readable[attention.index]
        return held and reads and attention.index >= self.method.first_layer()

    def attend(self, attention: Attention, run: Run) -> Output:
        # Stages of a method inside the LLM are none of this one's business.
        groups = dataclasses.replace(attention.tokens.groups, dropped=0)
        tokens = dataclasses.replace(attention.tokens, groups=groups)
        if self.method.sparse_attention:
            return self._attend_sparsely(attention, tokens, run)
        out = run(attention)
        scores = self._score(attention, tokens)
        if self.method.needs_all_layers:
            # Queries, keys and values need not wait, too.
            query, key = (held[:, :, :0].clone() for held in (tokens.query, tokens.key))
            rest = dataclasses.replace(tokens, query=query, key=key, value=None)
            self.waiting.append((attention.index, scores, rest))
        else:
            self._evict(attention.index, scores, tokens, self.method.budget(scores, tokens))
        return out

    def finish(self) -> None:
        forward = self.forward
        if self.waiting:
            parts = [self.method.statistics(scores, t.groups) for _, scores, t in self.waiting]
            statistics = torch.stack(on(parts[0].device, parts))
            for i, (index, scores, tokens) in enumerate(self.waiting):
                self._evict(index, scores, tokens, self.method.budgets(statistics.to(scores.device), tokens.groups)[i])
        if forward.past and forward.queries == 1 and forward.cache is not None:
            for layer in forward.held:
                _evict_fixed(layer)

    def _score(self, attention: Attention, tokens: LayerTokens) -> Tensor:
        """What the method scores, a mean over heads where the cache holds one compressed entry for all of them."""
        scores, layer = self.method.score(tokens), attention.layer
        assert layer is not None and layer.keys is not None
        scores = scores.mean(1, keepdim=True) if layer.keys.shape[1] < scores.shape[1] else scores
        if self.place.outcome.records:
            self.place.note_scores(self.forward, self.method, attention.index, scores)
        return scores

    def _stays(self, scores: Tensor, tokens: LayerTokens, budget: Tensor, held: int) -> tuple[Tensor, Tensor]:
        """Which image tokens stay, (groups, heads, n), and which of all the slots, (batch, heads, slots)."""
        stays = self.method.select(scores, budget)
        check_mask(self.method, stays, (len(tokens.slots), None, tokens.slots.shape[1]))
        heads, groups = stays.shape[1], tokens.groups
        mask = torch.ones(self.forward.ids.shape[0], heads, held + 1, dtype=torch.bool, device=stays.device)
        if tokens.visible is not None:
            mask[..., :-1] &= tokens.visible.unsqueeze(1)
        head = torch.arange(heads, device=mask.device)[None, :, None].expand_as(stays)
        # Padding points one past the end.
        slots = torch.where(tokens.slots < 0, held, tokens.slots).unsqueeze(1).expand_as(stays)
        mask[groups.row[:, None, None].expand_as(stays), head, slots] = stays
        return stays, mask[..., :-1]

    def _evict(self, index: int, scores: Tensor, tokens: LayerTokens, budget: Tensor) -> None:
        layer = self.forward.layer(index)
        assert layer is not None
        stays, mask = self._stays(scores, tokens, budget, layer.physical)
        into = self.method.merge(stays, tokens.groups)
        if into is not None:
            layer.merge(_joins(into, tokens.slots, tokens.groups, self.forward.ids.shape[0], layer.physical))
        distance = self.method.decode_distance
        # Where decoding evicts, too, rows must be aligned: padding goes even if nothing else does.
        if layer.keep(mask, tokens.visible if distance is None else None) is not None:
            self.forward.evicted.add(index)
        if distance is not None:
            layer.fixed_point = layer.physical - distance

    def _attend_sparsely(self, attention: Attention, tokens: LayerTokens, run: Run) -> Output:
        """Evict first; then only the rows whose entries stay attend, and the attention of the others is zero."""
        layer, forward, query = attention.layer, self.forward, attention.query
        assert layer is not None
        scores, width = self._score(attention, tokens), query.shape[2]
        _, stay = self._stays(scores, tokens, self.method.budget(scores, tokens), layer.physical)
        # The last token must attend even if it is an image token: its row becomes the next token.
        stay = stay.scatter(2, (tokens.last + tokens.past)[:, None, None].expand(-1, stay.shape[1], 1), True)
        choice = layer.keep(stay[:, :1], tokens.visible)
        if choice is None:
            return run(attention)
        # Not the cache's own, which may be compressed.
        key, value = (gather_entries(held, choice.source) for held in (attention.key, attention.value))
        if tokens.past:
            choice = compact(stay[:, :1, tokens.past :], torch.ones_like(stay[:, :1, tokens.past :]))
            assert choice is not None
        source, real = choice.source[:, 0], choice.real[:, 0]
        rows = source[:, None, :, None]
        picked = query.gather(2, rows.expand(-1, query.shape[1], -1, query.shape[3]))
        logical = source if forward.rows is None else forward.rows.source.gather(1, source)
        filled, at = forward.visible(layer, layer.physical), layer.full_index(len(query), query.device)
        out, weights = run(attention.over(key, value, filled, picked, logical, at))
        forward.entered[attention.index] = torch.where(real, logical, -1)
        out = out.masked_fill(~real[..., None, None], 0)
        full = out.new_zeros(out.shape[0], width, *out.shape[2:])
        return full.scatter_add(1, source[..., None, None].expand_as(out), out), weights


def _joins(into: Tensor, slots: Tensor, groups: ImageGroups, batch: int, held: int) -> Tensor:
    """The slot that every slot joins, (batch, heads, slots), from what every image token joins."""
    heads, device = into.shape[1], into.device
    joins = torch.arange(held + 1, device=device).expand(batch, heads, -1).clone()
    spots = slots.unsqueeze(1).expand_as(into)
    target = spots.gather(-1, into)
    at = torch.where(spots < 0, held, spots)
    head = torch.arange(heads, device=device)[None, :, None].expand_as(into)
    joins[groups.row[:, None, None].expand_as(into), head, at] = torch.where(spots < 0, held, target)
    return joins[..., :-1]


def _evict_fixed(layer: PrunedLayer) -> None:
    """Evict the entry that stands at the layer's fixed point."""
    if layer.fixed_point is None:
        return
    if layer.fixed_point < 0:  # the prompt was shorter than the distance: wait until as much is held
        layer.fixed_point += 1
    elif layer.fixed_point < layer.physical - 1:
        layer.evict_slot(layer.fixed_point)
