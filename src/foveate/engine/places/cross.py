"""Cross-attention to image features: trimmed once, in the first cross-attention layer of a prefill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...layout import Tile
from ...methods.attention import received_by_features
from ...methods.base import CrossMethod, Method
from ...methods.contract import check_scores
from ..attention import Attention, Output, Run
from ..cache import PrunedLayer
from ..forward import Forward
from ..report import Outcome
from ..rows import Rows, compact, gather_rows
from ..scores import laid_out
from ..target import Target
from .place import Action, Call, Place


class CrossPlace(Place):
    """The cross-attention layers of a decoder; there even without a method, since their cache has its own length."""

    def __init__(self, target: Target, method: CrossMethod | None, outcome: Outcome) -> None:
        super().__init__(target, outcome)
        self.method = method
        self.features_per_image = target.family.features_per_image(target.base.config)

    @classmethod
    def of(cls, target: Target, methods: Sequence[Method], outcome: Outcome) -> Place | None:
        if not target.crosses:
            return None
        return cls(target, next((m for m in methods if isinstance(m, CrossMethod)), None), outcome)

    def refuse(self, call: Call) -> None:
        if call.candidates and self.method is not None:
            raise UnsupportedError(
                "assisted decoding would crop the image features of cross-attention layers: generate without "
                "prompt_lookup_num_tokens or an assistant model"
            )

    @property
    def reads_prompt(self) -> bool:
        return self.method is not None

    def act(self, forward: Forward) -> Action | None:
        return CrossAction(self, forward)


class CrossAction(Action):
    """The image features of one pass."""

    def __init__(self, place: CrossPlace, forward: Forward) -> None:
        self.place, self.forward, self.stream = place, forward, forward.streams["cross"]
        self._text: Tensor | None = None  # bool (batch, q), the rows whose attention counts; until the choice is made
        self._masks: dict[int, Tensor] = {}

    def before_layer(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Hand over only the features that stay."""
        states, text = kwargs.get("cross_attention_states"), kwargs.get("full_text_row_masked_out_mask")
        if self.forward.target.kinds[index] != "cross" or states is None:
            return hidden, kwargs
        valid = self.forward.valid()
        states = states.to(valid.device).reshape(valid.shape[0], -1, states.shape[-1])
        if self.stream.rows is not None:
            return hidden, {**kwargs, "cross_attention_states": gather_rows(states, self.stream.rows.source)}
        self.stream.tokens = states.shape[1]
        self._text = valid if text is None else valid & (text[:, 0, :, 0] > 0).to(valid.device)
        return hidden, kwargs

    def attends(self, attention: Attention) -> bool:
        return attention.kind == "cross"

    def attend(self, attention: Attention, run: Run) -> Output:
        layer = attention.layer
        if layer is not None and layer.index is not None:
            attention.mask = self._mask(layer, attention.mask, attention.query)
        out = run(attention)
        if layer is not None and self._trim(layer, attention):
            self.forward.evicted.add(attention.index)
        return out

    def image_tokens(self) -> Sequence[Sequence[tuple[Tensor, tuple[Tile, ...]]]]:
        if not self.forward.brings_images:
            return ()
        target = self.place.target
        return target.family.feature_places(target.base.config, self.forward.arguments)

    def _mask(self, layer: PrunedLayer, mask: Tensor | None, query: Tensor) -> Tensor:
        """The columns of a logical (batch, 1, q, features) mask that a trimmed layer holds, fillers hidden."""
        index = layer.full_index(query.shape[0], query.device)[:, 0]
        key = id(layer.index)
        if key not in self._masks:
            if mask is None:
                columns = query.new_zeros(index.shape[0], 1, query.shape[2], index.shape[1])
            else:
                columns = mask.gather(3, index.clamp(min=0)[:, None, None].expand(-1, 1, mask.shape[2], -1))
            # Below even the lowest float: a row that sees none of the kept features must not see fillers instead.
            self._masks[key] = columns.to(query.dtype).masked_fill((index < 0)[:, None, None], -torch.inf)
        return self._masks[key]

    def _note_scores(self, attention: Attention, layer: PrunedLayer, scores: Tensor | None, seen: Tensor) -> None:
        """For the report: what each feature counted for, of the query heads that share a KV head the most."""
        method, (batch, n) = self.place.method, seen.shape
        if method is None or scores is None:
            return
        check_scores(method, scores, tuple(seen.shape) if scores.ndim == 2 else (batch, attention.query.shape[1], n))
        if scores.ndim > 2:
            scores = scores.unflatten(1, (attention.key.shape[1], -1)).amax(2)
        at = torch.arange(layer.length - n, layer.length, device=seen.device)
        row = torch.arange(batch, device=seen.device)
        of_layers = self.forward.scores.setdefault(method.name, {})
        of_layers[attention.index] = laid_out(scores, torch.where(seen, at, -1), row, (batch, layer.length))

    def _trim(self, layer: PrunedLayer, attention: Attention) -> bool:
        """Behind the first cross-attention: choose, and evict the others from this layer's cache."""
        method, text = self.place.method, self._text
        if method is None or text is None or self.stream.rows is not None:
            return False
        text = text.to(attention.query.device)
        scores = received_by_features(attention.query, attention.key, attention.scaling, attention.mask, text)
        received, seen = (part[..., -self.stream.tokens :] for part in scores)
        images = seen.view(seen.shape[0], -1, self.place.features_per_image).any(-1).sum(-1)
        chosen = method.select(received, seen, images)
        if self.place.outcome.records:
            self._note_scores(attention, layer, method.score(received, seen), seen)
        self._text = None
        if not bool((seen & ~chosen).any()):
            return False
        # A sample without a picture has nothing to prune, and its rows read every column in the untouched model.
        chosen = chosen | ~seen.any(-1, keepdim=True)
        choice = compact(chosen.unsqueeze(1), torch.ones_like(chosen).unsqueeze(1))
        assert choice is not None
        self.stream.rows = Rows(choice.source[:, 0], choice.real[:, 0], choice.ragged)
        old = layer.physical - self.stream.tokens
        return layer.keep(torch.nn.functional.pad(chosen, (old, 0), value=True).unsqueeze(1)) is not None
