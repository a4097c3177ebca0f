"""Encoder methods that merge, against plain models whose embeddings went through the same arithmetic token by token.

The reference reads an untouched eager encoder, chooses and merges in plain Python, writes the new embeddings over the
old ones of the whole prompt, and hides what left from every query. Nothing of foveate's code takes part in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import patch

import oracle
import pytest
import tiny
import torch
from cases import TOLERANCE, image_tokens
from test_maths_encoder import slow_pooling, slow_visionzip
from torch import Tensor
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
from transformers.vision_utils import get_vision_window_index

import foveate
from foveate.testing.tiny.llava_next import PINPOINTS, image_size_to_num_patches

FAR = 1e-2  # what a mistake costs at least
METHODS = {"visionzip": dict(keep=0.5, contextual=0.4), "pooling": dict(keep=0.25)}
families = pytest.mark.parametrize("family", tiny.CORE_DECODERS)
batches = pytest.mark.parametrize("batch", tiny.BATCHES)
backends = pytest.mark.parametrize("attn", ["eager", "sdpa"])
decodings = pytest.mark.parametrize("decoding", [oracle.GREEDY, oracle.BEAMS], ids=["greedy", "beams"])
names = pytest.mark.parametrize("name", METHODS)


# Reading an untouched encoder --------------------------------------------------------------------------------


@dataclass
class Picture:
    """What an encoder says of a tile: (n,) scores, (n, d) keys, (n, width) states; and which tokens of its image.

    number: which of the pictures that the encoder saw.
    """

    grid: tuple[int, int]
    index: list[int]
    scores: Tensor
    keys: Tensor
    states: Tensor
    number: int = 0


def tower_parts(base, pixels: Tensor, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """(pictures, patches) scores, (..., d) keys, mean over heads, and (..., width) states.

    The score is the attention of [CLS], summed over heads; what each patch receives where no [CLS] comes first.
    """
    seen: list[Tensor] = []
    tower = base.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    handle = layers[-2].self_attn.k_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    out = tower(pixels, output_attentions=True, output_hidden_states=True)
    handle.remove()
    scores = out.attentions[-2].sum(1)[:, 0, 1:] if prefix else out.attentions[-2].mean(1).mean(1)
    keys = seen[0][:, prefix:].unflatten(-1, (tiny.VISION["num_attention_heads"], -1)).mean(2)
    return scores, keys, out.hidden_states[base.config.vision_feature_layer][:, prefix:]


def read_llava(base, batch: dict) -> list[list[Picture]]:
    prefix = base.config.vision_config.model_type.startswith("clip")
    handed_on = int(prefix and base.config.vision_feature_select_strategy == "full")
    parts = tower_parts(base, batch["pixel_values"], int(prefix))
    index = list(range(handed_on, handed_on + 36))
    return [[Picture((6, 6), index, *part, number)] for number, part in enumerate(zip(*parts, strict=True))]


def read_llava_next(base, batch: dict) -> list[list[Picture]]:
    """The model's own packing says where patches end up: it is given their numbers."""
    counts = [image_size_to_num_patches(size, PINPOINTS, 16) for size in batch["image_sizes"]]
    pixels = torch.cat([image[:count] for image, count in zip(batch["pixel_values"], counts, strict=True)])
    parts = [part.flatten(0, 1) for part in tower_parts(base, pixels, 1)]
    numbers = torch.arange(len(pixels) * 16.0).view(-1, 16, 1).split(counts)
    packed, _ = base.pack_image_features(numbers, batch["image_sizes"], "default", torch.tensor([-1.0]))
    images = []
    for tokens in packed:
        tiles: dict[int, list[tuple[int, int]]] = {}
        for at, number in enumerate(tokens.flatten().long().tolist()):
            if number >= 0:
                tiles.setdefault(number // 16, []).append((at, number))
        pictures = []
        for picture, members in sorted(tiles.items()):
            at, patches = (list(part) for part in zip(*members, strict=True))
            rows = len({patch % 16 // 4 for patch in patches})
            pictures.append(Picture((rows, len(at) // rows), at, *(part[patches] for part in parts), picture))
        images.append(pictures)
    return images


def read_qwen(base, batch: dict) -> list[list[Picture]]:
    """The last full-attention block in front of the final one, merged 2 x 2, with the window order undone."""
    visual, eager = base.visual, qwen.eager_attention_forward
    block = visual.blocks[[i for i in visual.fullatt_block_indexes if i <= len(visual.blocks) - 2][-1]].attn
    scores, keys = [], []

    def watched(module, query, key, *args, **kwargs):
        output, weights = eager(module, query, key, *args, **kwargs)
        if module is block:
            scores.append(weights[0].mean(0).mean(0))
            keys.append(key[0].mean(0))
        return output, weights

    grids = batch["image_grid_thw"]
    with patch.object(qwen, "eager_attention_forward", watched):
        features = base.get_image_features(batch["pixel_values"], grids, return_dict=True).pooler_output
    order, _ = get_vision_window_index(grids, visual.spatial_merge_size, visual.window_size, visual.patch_size)
    sizes = [len(feature) for feature in features]
    merged = [torch.cat(part).unflatten(0, (-1, 4)).mean(1)[order.argsort()].split(sizes) for part in (scores, keys)]
    return [
        [Picture((height // 2, width // 2), list(range(len(feature))), score, key, feature)]
        for (_, height, width), feature, score, key in zip(grids.tolist(), features, *merged, strict=True)
    ]


READ = {"llava_next": read_llava_next, "qwen2_5_vl": read_qwen}


# The reference -----------------------------------------------------------------------------------------------


def shares(total: int, sizes: list[int]) -> list[int]:
    """Largest remainder: at first the whole parts, then one more for those that lost most."""
    exact = [total * size / sum(sizes) for size in sizes]
    parts = [int(share) for share in exact]
    for i in sorted(range(len(sizes)), key=lambda i: parts[i] - exact[i])[: total - sum(parts)]:
        parts[i] += 1
    return parts


def merged_tokens(name: str, base, picture: Picture, features: Tensor, budget: int) -> dict[int, Tensor]:
    """What each kept token of a tile becomes. features: (n, hidden) of the tile."""
    if name == "pooling":
        return slow_pooling(features, budget, picture.grid)
    project = getattr(base, "multi_modal_projector", lambda states: states)
    share = METHODS[name]["contextual"]
    dominant, _, new = slow_visionzip(picture.scores.tolist(), picture.states, picture.keys, budget, share)
    return {i: features[i] for i in dominant} | {t: project(x.to(features.dtype)) for t, x in new.items()}


@torch.no_grad()
def reference(family: str, name: str, batch: dict, images, sequences: Tensor, rows: Tensor, merge: bool = True):
    """Logits of every step of `sequences`, and bool (batch, prompt), what was kept."""
    model = tiny.build(family, "eager")
    embeds, positions = oracle.embedded(model, batch)
    kept, embeds = batch["attention_mask"].bool(), embeds.clone()
    pictures = iter(READ.get(family, read_llava)(model.model, batch))
    for b, counts in enumerate(tiny.image_counts(family, images)):
        spans = image_tokens(batch)[b].nonzero().flatten().split(counts)
        for span in spans:
            tiles = next(pictures)
            structure = len(span) - sum(len(tile.index) for tile in tiles)
            total = int(METHODS[name]["keep"] * len(span)) - structure
            old = embeds[b, span].clone()
            for tile, budget in zip(tiles, shares(total, [len(tile.index) for tile in tiles]), strict=True):
                new = merged_tokens(name, model.model, tile, old[tile.index], budget)
                kept[b, span[tile.index]] = False
                for i, value in new.items():
                    kept[b, span[tile.index[i]]] = True
                    if merge:
                        embeds[b, span[tile.index[i]]] = value
    return logits_of(model, embeds, positions, kept, sequences, rows), kept


def logits_of(model, embeds: Tensor, positions: Tensor, kept: Tensor, sequences: Tensor, rows: Tensor) -> Tensor:
    """Logits of every step of `sequences` behind prompts of these embeddings, of which only what is kept is seen."""
    prompt = embeds.shape[1]
    told = model.get_input_embeddings()(sequences[:, prompt:-1])
    steps = torch.arange(1, told.shape[1] + 1)
    later = positions[..., rows, -1:] + steps
    visible = torch.cat([kept[rows], torch.ones(told.shape[:2], dtype=torch.bool)], 1)
    length = visible.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril() & visible[:, None, None]
    out = model.model.language_model(
        inputs_embeds=torch.cat([embeds[rows], told], 1),
        position_ids=torch.cat([positions[..., rows, :], later], -1),
        attention_mask=torch.where(mask, 0.0, torch.finfo(torch.float32).min),
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state[:, prompt - 1 :])


def pruned(family: str, name: str, batch: dict, attn: str, decoding: dict):
    with foveate.prune(tiny.build(family, attn), name, record=True, **METHODS[name]) as handle:
        return oracle.run(handle.model, batch, **decoding), handle.report


def check(name: str, family: str, spec: dict, attn: str, decoding: dict) -> None:
    batch = tiny.inputs(family, **spec)
    run, report = pruned(family, name, batch, attn, decoding)
    copies = len(report.layers[0].kept) // len(batch["input_ids"])  # the prefill runs a row for each beam
    rows = run.rows // copies
    dense, kept = reference(family, name, batch, spec["images"], run.sequences, rows)
    for layer in report.layers:
        assert torch.equal(layer.kept[:, 0], kept.repeat_interleave(copies, 0))
    assert (dense - run.logits).abs().max() < TOLERANCE
    unmerged, _ = reference(family, name, batch, spec["images"], run.sequences, rows, merge=False)
    assert (unmerged - run.logits).abs().max() > FAR, "merging makes a difference"


@names
@families
@batches
@backends
@decodings
@pytest.mark.sampled(5)
def test_logits_equal_a_plain_model_with_merged_embeddings(name, family, batch, attn, decoding):
    check(name, family, tiny.BATCHES[batch], attn, decoding)


@names
@pytest.mark.parametrize("variant", ["llava_cls", "llava_siglip"])
def test_a_cls_token_that_is_handed_on_takes_no_part_and_one_that_is_missing_is_replaced(name, variant):
    check(name, variant, tiny.BATCHES["ragged"], "sdpa", oracle.GREEDY)


@names
def test_all_tokens_of_an_image_change_nothing(name):
    """A budget of the image's size: every cell is a token, and no contextual token has anything to gather."""
    batch, model = tiny.inputs("llava", **tiny.BATCHES["ragged"]), tiny.build("llava")
    plain = oracle.run(model, batch, **oracle.GREEDY)
    with foveate.prune(model, name, keep=36):
        run = oracle.run(model, batch, **oracle.GREEDY)
    assert (run.logits - plain.logits).abs().max() < TOLERANCE
