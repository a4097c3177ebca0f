"""VisToG against a plain model: one masked run of its encoder, groups made patch by patch, and embeddings by hand.

Nothing of foveate's code takes part in the reference; only the weights are the same.
"""

from __future__ import annotations

import copy

import oracle
import pytest
import tiny
import torch
from cases import image_tokens
from test_maths_vistog import slow_vistog
from test_merging_encoder import FAR, READ, backends, batches, decodings, logits_of, read_llava
from torch import Tensor

import foveate
from foveate import glimpse
from foveate.engine.support import find_target
from foveate.engine.target import fingerprint
from foveate.evaluation import answer
from foveate.methods import vistog
from foveate.methods.trained import write_plugin
from foveate.methods.vistog import members
from foveate.testing.tiny.llava_next import PINPOINTS, image_size_to_num_patches

TOLERANCE = 1e-5
CHOICES = [("hard", "centroid"), ("hard", "first"), ("soft", "centroid")]
families = pytest.mark.parametrize("family", ["llava", "llava_next"])
choices = pytest.mark.parametrize(("grouping", "place"), CHOICES)


def trained(family: str, **options) -> foveate.VisToG:
    """With weights under which everything matters."""
    method = foveate.VisToG(**{"keep": 5, **options})
    rng = torch.Generator().manual_seed(7)
    weights = method.initial(find_target(tiny.build(family)).host)
    weights["seeds"] = torch.randn(weights["seeds"].shape, generator=rng)
    for tensor in weights.values():
        tensor += 0.2 * torch.randn(tensor.shape, generator=rng) * (tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 1)
    return method.holding(weights)


# The reference -----------------------------------------------------------------------------------------------


def readers(base, batch: dict, seeds: Tensor) -> Tensor:
    """(pictures, m, width): the seeds behind the feature layer of a run beside the patches, which do not see them."""
    pixels, tower = batch["pixel_values"], base.vision_tower
    if pixels.ndim == 5:  # of tiled models: the tiles that are none are filled up, and come last
        sizes = [image_size_to_num_patches(size, PINPOINTS, 16) for size in batch["image_sizes"]]
        pixels = torch.cat([image[:size] for image, size in zip(pixels, sizes, strict=True)])
    states = tower.embeddings(pixels)
    if hasattr(tower, "pre_layrnorm"):
        states = tower.pre_layrnorm(states)
    both, m = torch.cat([states, seeds.expand(len(states), -1, -1)], 1), len(seeds)
    mask = torch.zeros(1, 1, both.shape[1], both.shape[1])
    mask[..., :-m, -m:] = -torch.inf
    for layer in tower.encoder.layers[:-1]:
        both = layer(both, mask)
    return both[:, -m:]


@torch.no_grad()
def reference(family: str, method, batch: dict, images, sequences: Tensor, rows: Tensor, turned: int = 0):
    """Logits of every step of `sequences`, and bool (batch, prompt), what was kept. turned: groups change places."""
    model = tiny.build(family, "eager")
    weights, projector = method.tensors, copy.deepcopy(model.model.multi_modal_projector)
    projector.load_state_dict({k.removeprefix("projector."): v for k, v in weights.items() if k.startswith("proj")})
    embeds, positions = oracle.embedded(model, batch)
    kept, embeds = batch["attention_mask"].bool(), embeds.clone()
    tokens = readers(model.model, batch, weights["seeds"])
    pictures = iter(READ.get(family, read_llava)(model.model, batch))
    for b, counts in enumerate(tiny.image_counts(family, images)):
        for span in image_tokens(batch)[b].nonzero().flatten().split(counts):
            for tile in next(pictures):
                if len(tile.index) <= method.keep:
                    continue
                at, grouped = slow_vistog(weights, tokens[tile.number], tile.states, method.grouping, method.carriers)
                kept[b, span[tile.index]] = False
                for group in range(len(at)):
                    place = span[tile.index[at[group]]]
                    kept[b, place] = True
                    embeds[b, place] = projector(grouped[(group + turned) % len(at)])
    return logits_of(model, embeds, positions, kept, sequences, rows), kept


def check(family: str, method, spec: dict, attn: str, decoding: dict) -> float:
    """Compare a run with the one by hand, and return the largest difference."""
    batch = tiny.inputs(family, **spec)
    with foveate.prune(tiny.build(family, attn), method, record=True) as pruned:
        run = oracle.run(pruned.model, batch, **decoding)
        report = pruned.report
    copies = len(report.layers[0].kept) // len(batch["input_ids"])  # the prefill runs a row for each beam
    rows = run.rows // copies
    dense, kept = reference(family, method, batch, spec["images"], run.sequences, rows)
    for layer in report.layers:
        assert torch.equal(layer.kept[:, 0], kept.repeat_interleave(copies, 0))
    worst = (dense - run.logits).abs().max()
    assert worst < TOLERANCE * run.logits.abs().max()
    turned, _ = reference(family, method, batch, spec["images"], run.sequences, rows, turned=1)
    assert (turned - run.logits).abs().max() > FAR, "it matters which group stands where"
    return float(worst)


@families
@batches
@backends
@decodings
def test_logits_equal_a_plain_model_with_embeddings_made_by_hand(family, batch, attn, decoding):
    check(family, trained(family), tiny.BATCHES[batch], attn, decoding)


@families
@choices
def test_so_they_do_for_every_choice(family, grouping, place):
    check(family, trained(family, grouping=grouping, carriers=place), tiny.BATCHES["ragged"], "sdpa", oracle.GREEDY)


@pytest.mark.parametrize("variant", ["llava_cls", "llava_siglip"])
def test_a_cls_token_that_is_handed_on_stays_beside_the_groups(variant):
    check(variant, trained(variant), tiny.BATCHES["ragged"], "sdpa", oracle.GREEDY)


def test_a_tile_of_no_more_tokens_than_groups_stays_as_it_is():
    spec = tiny.BATCHES["ragged"]
    images = READ["llava_next"](tiny.build("llava_next", "eager").model, tiny.inputs("llava_next", **spec))
    sizes = {len(tile.index) for tiles in images for tile in tiles}
    keep = min(sizes)
    assert keep < max(sizes)
    check("llava_next", trained("llava_next", keep=keep), spec, "sdpa", oracle.GREEDY)


# What holds beside --------------------------------------------------------------------------------------------


@families
def test_the_patches_stay_as_they_are(family):
    model, batch = tiny.build(family), tiny.inputs(family)
    inputs = {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}
    seen: list[Tensor] = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.model.get_image_features(**inputs)
    with foveate.prune(model, trained(family)):
        model.model.get_image_features(**inputs)
    assert torch.equal(seen[0], seen[1])


def test_a_later_turn_goes_on_behind_the_groups():
    model, batch = tiny.build("llava"), tiny.inputs("llava", **tiny.BATCHES["ragged"])
    with foveate.prune(model, trained("llava"), record=True) as pruned:
        first = oracle.run(model, batch, max_new_tokens=3)
        turn = tiny.next_turn(model, batch, first.sequences, True)
        oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=3)
        assert pruned.report.images == [[(36, 5)]] * 3


def test_a_keep_that_is_no_number_of_groups_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep must be an int for vistog"):
        foveate.prune(tiny.build("llava"), foveate.VisToG(keep=0.5).untrained())
    method, mark = trained("llava"), fingerprint(tiny.build("llava").model)
    write_plugin(tmp_path / "a.safetensors", method, "llava", mark, method.tensors)
    for keep in (0.5, 6):
        with pytest.raises(ValueError, match=f"trained with keep=5, not keep={keep}: say keep=5"):
            foveate.prune(tiny.build("llava"), foveate.VisToG(keep=keep, weights=tmp_path / "a.safetensors"))


@pytest.mark.parametrize("options", [dict(grouping="gumbel"), dict(carriers="last"), dict(grouping=None)])
def test_bad_choices_are_told_the_good_ones(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be .* or "):
        foveate.VisToG(**options)


def test_other_models_than_it_was_trained_for_are_refused():
    with pytest.raises(foveate.UnsupportedError, match="trained on this very model"):
        foveate.prune(tiny.build("llava"), "vistog")
    with pytest.raises(foveate.UnsupportedError, match="has no place for them"):
        foveate.prune(tiny.build("qwen2_5_vl"), "vistog")


def test_the_weights_of_glimpse_gather_every_patch_once_and_answer(monkeypatch):
    model, processor = glimpse.load()
    seen: list[Tensor] = []
    monkeypatch.setattr(vistog, "members", lambda affinities: seen.append(members(affinities)) or seen[-1])
    questions = glimpse.heldout(8, kinds=["where"])
    images, asked = [question.images for question in questions], [question.question for question in questions]
    with foveate.prune(model, "vistog"):
        said = answer(model, processor, images, asked, max_new_tokens=4)
    assert sum(text == question.answer for text, question in zip(said, questions, strict=True)) >= 6
    assert seen and all((joins.sum(1) == 1).all() and (joins.sum((1, 2)) == 144).all() for joins in seen)
