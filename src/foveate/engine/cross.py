"""Cross-attention to image features: trimmed once, in the first cross-attention layer of a prefill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..methods.base import CrossMethod
from .attention import received_by_features
from .cache import PrunedLayer
from .compact import Rows, compact, gather_rows


class CrossState:
    """The image features of one forward pass.

    tokens: features per sample that came with this forward. rows: those that stay, None while all do.
    """

    def __init__(self, method: CrossMethod | None, features_per_image: int) -> None:
        self.method = method
        self.features_per_image = features_per_image
        self.tokens = 0
        self.rows: Rows | None = None
        self._text: Tensor | None = None
        self._masks: dict[int, Tensor] = {}

    def enter(self, kwargs: dict[str, Any], valid: Tensor) -> dict[str, Any]:
        """In front of a cross-attention layer: hand over only the features that stay.

        valid: bool (batch, q), text rows that are no padding.
        """
        states, text = kwargs.get("cross_attention_states"), kwargs.get("full_text_row_masked_out_mask")
        if states is None:
            return kwargs
        states = states.reshape(valid.shape[0], -1, states.shape[-1])
        if self.rows is not None:
            return {**kwargs, "cross_attention_states": gather_rows(states, self.rows.source)}
        self.tokens = states.shape[1]
        self._text = valid if text is None else valid & (text[:, 0, :, 0] > 0)
        return kwargs

    def mask(self, layer: PrunedLayer, mask: Tensor | None, query: Tensor) -> Tensor:
        """The columns of a logical (batch, 1, q, features) mask that a trimmed layer holds, fillers hidden."""
        index = layer.full_index(query.shape[0], query.device)[:, 0]
        key = id(layer.index)
        if key not in self._masks:
            if mask is None:
                columns = torch.zeros(index.shape[0], 1, query.shape[2], index.shape[1], device=query.device)
            else:
                columns = mask.gather(3, index.clamp(min=0)[:, None, None].expand(-1, 1, mask.shape[2], -1))
            # Below even the lowest float: a row that sees none of the kept features must not see fillers instead.
            self._masks[key] = columns.to(query.dtype).masked_fill((index < 0)[:, None, None], -torch.inf)
        return self._masks[key]

    def trim(self, layer: PrunedLayer, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> bool:
        """Behind the first cross-attention: choose, and evict the others from this layer's cache."""
        if self.method is None or self._text is None or self.rows is not None:
            return False
        scores = received_by_features(query, key, scaling, mask, self._text)
        attention, seen = (part[..., -self.tokens :] for part in scores)
        images = seen.view(seen.shape[0], -1, self.features_per_image).any(-1).sum(-1)
        chosen = self.method.select(attention, seen, images)
        self._text = None
        if not bool((seen & ~chosen).any()):
            return False
        # A sample without a picture has nothing to prune, and its rows read every column in the untouched model.
        chosen = chosen | ~seen.any(-1, keepdim=True)
        choice = compact(chosen.unsqueeze(1), torch.ones_like(chosen).unsqueeze(1))
        assert choice is not None
        self.rows = Rows(choice.source[:, 0], choice.real[:, 0], choice.ragged)
        old = layer.physical - self.tokens
        return layer.keep(torch.nn.functional.pad(chosen, (old, 0), value=True).unsqueeze(1)) is not None
