"""Where a model looks: what the last token of a prompt pays to everything in front of it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from foveate.evaluation.dense import eager
from foveate.families import get_family


@torch.inference_mode()
def last_token_attention(model: Any, inputs: dict[str, Any]) -> dict[int, Tensor]:
    """The attention row of the prompt's last token in every decoder layer of an untouched model, first sample.

    inputs: what `generate` takes. Returns, by layer that attends, float32 (kv_heads, length), mean over the query heads
    that share a KV head; length is the prompt's, for cross-attention layers the number of image features. Only one
    layer's attention map is in memory at a time.
    """
    family = get_family(model.config)
    assert family is not None
    decoder = family.decoder(family.base(model))
    rows: dict[int, Tensor] = {}

    def note(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            weights = output[1][0, :, -1].float()
            rows.setdefault(index, weights.unflatten(0, (decoder.config.num_key_value_heads, -1)).mean(1).cpu())

        return hook

    with ExitStack() as hooks:
        for index, layer in enumerate(decoder.layers):
            attention = getattr(layer, family.cross_attention, None) or getattr(layer, family.self_attention, None)
            if attention is not None:
                hooks.enter_context(attention.register_forward_hook(note(index)))
        with eager(decoder):
            model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=1)
    return dict(sorted(rows.items()))
