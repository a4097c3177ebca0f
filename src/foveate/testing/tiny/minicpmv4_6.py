"""MiniCPM-V 4.6: 4 x 4 patches a token, and the decoder of Qwen3.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import IMAGE, PATCH, VIDEO, VISION, VISION_END, VISION_START, Tiny, moving
from .qwen2_5_vl import FILMS, GRIDS
from .qwen3_5 import Qwen35, hybrid


class MiniCPMV46(Tiny):
    name, before, after = "minicpmv4_6", (VISION_START,), (VISION_END,)
    rounding = Qwen35.rounding

    def options(self) -> dict[str, Any]:
        return dict(
            vision_config=VISION | dict(num_hidden_layers=5, image_size=48, patch_size=PATCH),
            text_config=hybrid(4) | dict(model_type="qwen3_5_text"),
            insert_layer_id=1,
            image_size=48,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )

    def tokens(self, kind: int) -> int:
        _, height, width = GRIDS[kind]
        return height * width // 16

    def pixels(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        sizes = [GRIDS[kind][1:] for kind in kinds]
        strips = [torch.randn(1, 3, PATCH, PATCH * height * width, generator=rng) for height, width in sizes]
        return {"pixel_values": torch.cat(strips, -1), "target_sizes": torch.tensor(sizes, dtype=torch.int32)}

    def clip(self, kind: int) -> list[int]:
        t, h, w = FILMS[kind]
        return [h * w // 16] * t

    def film(self, kind: int) -> list[int]:
        return [token for n in self.clip(kind) for token in (*self.before, *[VIDEO] * n, *self.after)]

    def films(self, kinds: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        sizes = [FILMS[kind][1:] for kind in kinds for _ in range(FILMS[kind][0])]
        strips = [moving(t, h * w, 3 * PATCH**2, rng) for t, h, w in (FILMS[kind] for kind in kinds)]
        strip = torch.cat(strips).view(-1, 3, PATCH, PATCH).permute(1, 2, 0, 3).flatten(2)[None]
        return {"pixel_values_videos": strip, "target_sizes_videos": torch.tensor(sizes, dtype=torch.int32)}

    def beside(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = torch.cat([one["pixel_values"], other["pixel_values"]], -1)
        return super().beside(one, other) | {"pixel_values": pixels}
