"""Mllama: 17 features a tile (16 patches and the CLS), read through cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from .base import LLM, PATCH, VOCAB, Tiny

MAX_TILES = 4
RATIOS = [2, 5, 6, 1]  # ids of [1, 2], [2, 1], [2, 2], [1, 1] in `supported_aspect_ratios`, offset by 1
TILES = [2, 2, 4, 1]


class Mllama(Tiny):
    name, whole = "mllama", True
    in_prompt, image_id = False, VOCAB

    def options(self) -> dict[str, Any]:
        vision = dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_global_layers=1,
            attention_heads=2,
            image_size=16,
            patch_size=PATCH,
            max_num_tiles=MAX_TILES,
            intermediate_layers_indices=[0, 2],
            vision_output_dim=96,
        )
        text = {
            **LLM,
            "num_hidden_layers": 6,
            "cross_attention_layers": [1, 3, 5],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
        return dict(vision_config=vision, text_config=text, image_token_index=VOCAB)

    def tokens(self, kind: int) -> int:
        return 1

    def features(self, kind: int) -> int:
        return 17 * TILES[kind]  # without those of padded tiles

    def images(self, ids: Tensor, kinds: Sequence[Sequence[int]], rng: torch.Generator) -> dict[str, Tensor]:
        most = max(map(len, kinds))
        batch = len(kinds)
        ratio_ids = torch.zeros(batch, most, dtype=torch.long)
        tile_mask = torch.zeros(batch, most, MAX_TILES, dtype=torch.long)
        tile_mask[:, :, 0] = 1  # the image processor marks the first tile of a padding image, too
        pixels = torch.zeros(batch, most, MAX_TILES, 3, 16, 16)
        for b, row in enumerate(kinds):
            for i, kind in enumerate(row):
                n = TILES[kind]
                ratio_ids[b, i] = RATIOS[kind]
                tile_mask[b, i, :n] = 1
                pixels[b, i, :n] = torch.randn(n, 3, 16, 16, generator=rng)
        mask = convert_sparse_cross_attention_mask_to_dense(
            [get_cross_attention_token_mask(row, VOCAB) for row in ids.tolist()],
            [[TILES[k] for k in row] for row in kinds],
            MAX_TILES,
            ids.shape[1],
        )
        return {
            "pixel_values": pixels,
            "aspect_ratio_ids": ratio_ids,
            "aspect_ratio_mask": tile_mask,
            "cross_attention_mask": torch.from_numpy(mask),
        }

    def go_on(self, model: PreTrainedModel, batch: dict, turn: dict, length: int, image: bool) -> dict[str, Tensor]:
        seen, tokens = batch["cross_attention_mask"], turn["input_ids"].shape[1]
        since = seen[:, -1:].expand(-1, tokens - seen.shape[1], -1, -1)
        if image:  # as the processor does: text looks at the image in front of it, and no longer at earlier ones
            since = since.clone()
            since[:, length - seen.shape[1] :] = 0
            fresh = torch.nn.functional.pad(turn["cross_attention_mask"], (0, 0, 0, 0, length, 0))
            turn["cross_attention_mask"] = torch.cat([torch.cat([seen, since], 1), fresh], 2)
        else:
            turn["cross_attention_mask"] = torch.cat([seen, since], 1)
        return turn
