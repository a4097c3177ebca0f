"""What FoPru reads from the vision encoder equals the encoder's own eager attention map, family by family."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import tiny
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
from transformers.vision_utils import get_vision_window_index

import foveate


def kept_tokens(model, batch: dict, **options) -> list[torch.Tensor]:
    """The mask of every image's kept tokens under FoPru."""
    with foveate.prune(model, "fopru", record=True, **options) as pruned, torch.no_grad():
        model(**batch, use_cache=True)
        report = pruned.report
    kept = report.layers[0].kept[:, 0]
    return [kept[row, image.positions] for row, images in enumerate(report.image_tokens) for image in images]


def best(received: torch.Tensor, given: torch.Tensor, k: int) -> list[int]:
    scores = received if received.var() >= given.var() else given
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))[:k])


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@torch.no_grad()
def test_clip_towers(family):
    batch, keep = tiny.inputs(family, **tiny.BATCHES["ragged"]), 0.5
    kept = kept_tokens(tiny.build(family), batch, keep=keep)
    base = tiny.build(family, "eager").model
    pixels = batch["pixel_values"]
    if family == "llava_next":  # a picture a tile, padded to the image with most tiles
        layouts = foveate.get_family(family).layouts(base.config, batch)
        pixels = pixels.flatten(0, 1)[pixels.flatten(0, 1).flatten(1).abs().sum(-1) > 0]
    maps = base.vision_tower(pixels, output_attentions=True).attentions[-2].mean(1)[:, 1:, 1:]
    received, given = maps.mean(1), maps.mean(2)
    if family == "llava":
        for image, r, g in zip(kept, received, given, strict=True):
            assert image.nonzero().flatten().tolist() == best(r, g, int(keep * len(r)))
        return
    for image, layout in zip(kept, layouts, strict=True):
        assert int(image.sum()) == int(keep * layout.tokens)
        for tile in layout.tiles:
            r, g = received.flatten()[tile.patches], given.flatten()[tile.patches]
            inside = image[tile.index]
            assert inside.nonzero().flatten().tolist() == best(r, g, int(inside.sum()))


@torch.no_grad()
def test_windowed_towers():
    """The last full-attention block before the final one, merged 2 x 2, with the window order undone."""
    batch, keep = tiny.inputs("qwen2_5_vl", **tiny.BATCHES["ragged"]), 0.5
    kept = kept_tokens(tiny.build("qwen2_5_vl"), batch, keep=keep)
    model = tiny.build("qwen2_5_vl", "eager")
    visual = model.model.visual
    full = [i for i in visual.fullatt_block_indexes if i <= len(visual.blocks) - 2]
    block, maps, eager = (
        visual.blocks[(full or visual.fullatt_block_indexes)[-1]].attn,
        [],
        qwen.eager_attention_forward,
    )

    def watched(module, *args, **kwargs):
        output, weights = eager(module, *args, **kwargs)
        if module is block:
            maps.append(weights[0].mean(0))
        return output, weights

    with patch.object(qwen, "eager_attention_forward", watched):
        model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    order, _ = get_vision_window_index(
        batch["image_grid_thw"], visual.spatial_merge_size, visual.window_size, visual.patch_size
    )
    back = order.argsort()
    received = torch.cat([a.mean(0) for a in maps]).view(-1, visual.spatial_merge_unit).mean(1)[back]
    given = torch.cat([a.mean(1) for a in maps]).view(-1, visual.spatial_merge_unit).mean(1)[back]
    assert not torch.equal(order, torch.arange(len(order))), "the windows do reorder"
    sizes = [len(image) for image in kept]
    for image, r, g in zip(kept, received.split(sizes), given.split(sizes), strict=True):
        assert image.nonzero().flatten().tolist() == best(r, g, int(keep * len(r)))
