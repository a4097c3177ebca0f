"""Tokens that skip layers beside methods of other places, in several turns, and in other ways to run a model."""

from __future__ import annotations

import copy

import oracle
import pytest
import tiny
import torch
from cases import TOLERANCE
from oracle import seen_and_kept
from test_decode import read_steps
from test_depth import Dense, backends, batches, families, routed, trained
from test_flash import Flash, flash_model
from test_merging_cache import image_spans
from transformers.modeling_utils import AttentionInterface

import foveate
from foveate.evaluation.proving import prove
from foveate.methods.videollm_mod import VideoLLMMoD

pytestmark = pytest.mark.sampled(5)

# Methods beside the routed layers, the routed layers, and for each of them a layer whose rows tell what was left there.
TOGETHER = {
    "encoder": ([foveate.FoPru(keep=0.5)], (0, 1, 3), {0: 2, 1: 2, 3: 2}),
    "layer": ([foveate.FastV(keep=0.5, layer=2)], (0, 3), {0: 1, 3: 2}),
    "stage in front of a routed layer": ([foveate.FastV(keep=0.5, layer=2)], (0, 2), {0: 1, 2: 3}),
    "stage behind and in front of one": ([foveate.PyramidDrop(keep=0.5, layers=(2,))], (1, 2), {1: 0, 2: 3}),
    "cache": ([foveate.VisualSnapKV(keep=0.5, window=8)], (1, 3), {1: 0, 3: 2}),
    "cache that compares layers": ([foveate.PLPHP(keep=0.5, start_layer=0)], (0, 1, 3), {0: 2, 1: 2, 3: 2}),
    "decoding steps": ([foveate.LastStep(keep=0.25, dense_layers=0, refresh=3)], (1, 3), {1: 0, 3: 2}),
    "random cache": ([foveate.RandomCache(keep=0.5)], (1, 3), {1: 0, 3: 2}),
    "all": (
        [foveate.FoPru(keep=0.5), foveate.PyramidDrop(keep=0.5, layers=(2,)), foveate.CSP(keep=0.5, window=0.3)],
        (1, 2),
        {1: 0, 2: 3},
    ),
}


@families
@batches
@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize(("attn", "decoding"), [("eager", "greedy"), ("sdpa", "beams")])
def test_methods_of_other_places(family, batch, together, attn, decoding):
    others, layers, like = TOGETHER[together]
    spec, method = tiny.BATCHES[batch], trained(family, layers=layers)
    batch, decoding = tiny.inputs(family, **spec), oracle.DECODING[decoding]
    run, report = routed(tiny.build(family, attn), [*others, method], batch, **decoding)
    dense, length = Dense(family, method), batch["input_ids"].shape[1]
    hides = [hide.rows(run.rows) for hide in seen_and_kept(report, length)]
    if report.decoding is not None:
        hides += read_steps(report, run, length)
    dense.alive = {layer: report.layers[other].seen[run.rows, 0] for layer, other in like.items()}
    dense.hides += hides
    logits, _ = dense.logits(batch, image_spans(family, batch, spec["images"]), run.sequences)
    for layer, alive in dense.alive.items():
        seen = report.layers[layer].seen[run.rows, 0]
        assert torch.equal(seen, alive & ~dense.skipped[layer]), "of what other methods left, the same goes through"
    assert (logits - run.logits).abs().max() < TOLERANCE


def test_a_cache_method_keeps_its_share_of_what_went_through():
    batch = tiny.inputs("llava")
    _, report = routed(tiny.build("llava"), [trained("llava"), foveate.RandomCache(keep=0.5)], batch, max_new_tokens=2)
    text = batch["input_ids"].shape[1] - 36
    assert [layer.kept_length - text for layer in report.layers] == [18, 4, 18, 4]
    assert [int(layer.seen.sum()) - text for layer in report.layers] == [36, 9, 36, 9]


@families
@pytest.mark.parametrize("other", [foveate.ElasticCache(keep=0.5), foveate.ZipVL(keep=0.5), foveate.VisionZip(keep=18)])
def test_what_is_merged_or_silenced_does_not_depend_on_the_batch(family, other):
    """Their own references cannot route; behind padding and beside another sample they must do the same."""
    alone, model = tiny.inputs(family), tiny.build(family)
    wide = {name: torch.cat([value, value]) for name, value in alone.items()}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in wide:
            wide[name] = torch.nn.functional.pad(wide[name], (3, 0))
            wide[name][1, 3:5] = 0  # the second sample begins later
    lone, _ = routed(model, [trained(family), other], alone, max_new_tokens=6)
    both, _ = routed(tiny.build(family, "eager"), [trained(family), other], wide, max_new_tokens=6)
    assert (both.logits[0] - lone.logits[0]).abs().max() < TOLERANCE
    assert (both.logits[1] - lone.logits[0]).abs().max() > TOLERANCE, "another sample"


# Frames that arrive turn by turn on one cache ---------------------------------------------------------------


def next_spans(family: str, rows: int, past: int) -> list:
    """Where the image of `tiny.next_turn` lies, among the tokens that its prefill computes."""
    fresh = tiny.inputs(family, (1,) * rows, (4,) * rows, 50)
    spans = image_spans(family, fresh, (1,) * rows, 50)
    return [(row, *([k + past for k in part] for part in parts)) for row, *parts in spans]


@families
@batches
@backends
def test_a_turn_with_a_new_image(family, batch, attn):
    spec, method, model = tiny.BATCHES[batch], trained(family), tiny.build(family, attn)
    batch = tiny.inputs(family, **spec)
    with foveate.prune(model, method, record=True) as pruned:
        first = oracle.run(model, batch, max_new_tokens=6)
        turn = tiny.next_turn(model, batch, first.sequences, image=True)
        second = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=8)
        report = pruned.report
    dense = Dense(family, method)
    logits, cache = dense.logits(batch, image_spans(family, batch, spec["images"]), first.sequences)
    assert (logits - first.logits).abs().max() < TOLERANCE
    earlier = dict(dense.skipped)
    # The answer's last token was not computed yet: it is the first of this turn.
    spans, past = next_spans(family, len(first.sequences), 1), first.sequences.shape[1] - 1
    logits, _ = dense.logits(turn | {tiny.CACHE: cache}, spans, second.sequences, past)
    assert (logits - second.logits).abs().max() < TOLERANCE
    for layer in method.layers:
        gone = dense.skipped[layer].clone()
        gone[:, : earlier[layer].shape[1]] |= earlier[layer]
        assert torch.equal(report.layers[layer].kept[:, 0], turn["attention_mask"].bool() & ~gone)
    for layer in second.cache.layers:
        for tensor in (layer.keys, layer.values):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@torch.no_grad()
def test_frames_one_by_one_are_frames_at_once():
    """A frame is chosen from itself, by what stands before it: when the next one comes makes no difference."""
    batch, model = tiny.inputs("llava", images=(3, 3), text=(6, 6)), tiny.build("llava")
    ids, mask, pixels = batch["input_ids"], batch["attention_mask"], batch["pixel_values"].unflatten(0, (2, 3))
    mask[1, 0] = 0
    ends = (ids[0] == tiny.IMAGE).nonzero().flatten()[35::36] + 1
    cuts = [int(ends[0]), int(ends[1]) + 1, ids.shape[1]]  # right behind a frame, and through the words behind it
    with foveate.prune(model, trained("llava")):
        whole = model(**batch, use_cache=True)
        cache, at = None, 0
        for n, end in enumerate(cuts):
            part = {"input_ids": ids[:, at:end], "attention_mask": mask[:, :end], "pixel_values": pixels[:, n]}
            out = model(**part, **({} if cache is None else {tiny.CACHE: cache}), use_cache=True)
            cache, at = getattr(out, tiny.CACHE), end
    assert (out.logits - whole.logits[:, -out.logits.shape[1] :]).abs().max() < TOLERANCE
    for one, at_once in zip(cache.layers, getattr(whole, tiny.CACHE).layers, strict=True):
        assert one.keys.shape[2] == (at_once.keys.shape[2] if one.index is not None else ids.shape[1])
        torch.testing.assert_close(one.keys[0], at_once.keys[0], atol=1e-4, rtol=1e-4)


# Other ways to run a model ------------------------------------------------------------------------------------


@families
@batches
@backends
@torch.no_grad()
def test_a_plain_forward_scores_every_token(family, batch, attn):
    """Also without a cache: nothing is evicted that is needed later."""
    spec, method = tiny.BATCHES[batch], trained(family)
    batch, dense = tiny.inputs(family, **spec), Dense(family, method)
    dense.spans = image_spans(family, batch, spec["images"])
    with oracle.masked(dense.model, dense.hides), dense.routing(1):
        expected = dense.model(**batch).logits
    for use_cache in (True, False):
        model = tiny.build(family, attn)
        with foveate.prune(model, method, record=True) as pruned:
            out = model(**batch, use_cache=use_cache).logits
        # Padding attends to nothing, and what its rows hold means nothing.
        assert (out - expected)[batch["attention_mask"].bool()].abs().max() < TOLERANCE
        skips = [int((~layer.seen).sum()) > int((batch["attention_mask"] == 0).sum()) for layer in pruned.report.layers]
        assert skips == [False, True, False, True]


@families
@torch.no_grad()
def test_labels_and_prompts_change_nothing(family):
    batch, model = tiny.inputs(family, text=(9,)), tiny.build(family)
    labels = batch["input_ids"].clone()
    labels[:, :-4] = -100
    with foveate.prune(model, trained(family)) as pruned:
        plain = model(**batch).logits
        assert torch.equal(model(**batch, labels=labels).logits, plain), "an answer takes no part in choosing"
        with pruned.prompt(labels.shape[1] - 4):
            assert (model(**batch).logits - plain).abs().max() < TOLERANCE


@families
def test_without_a_cache_generation_is_the_same(family):
    batch, model = tiny.inputs(family), tiny.build(family)
    cached, _ = routed(model, trained(family), batch, max_new_tokens=5)
    without, _ = routed(model, trained(family), batch, max_new_tokens=5, use_cache=False)
    assert (cached.logits - without.logits).abs().max() < TOLERANCE


@families
@backends
def test_guesses_are_accepted_and_taken_back(family, attn):
    spec, method = dict(images=(1,), text=(30,)), trained(family)
    batch, model = tiny.inputs(family, **spec), tiny.build(family, attn)
    batch["input_ids"][:, -10:] = batch["input_ids"][:, -30:-20]  # something to look up
    batch["input_ids"][:, -20:-10] = batch["input_ids"][:, -30:-20]
    greedy, _ = routed(model, method, batch, **oracle.GREEDY)
    lookup, _ = routed(model, method, batch, **oracle.GREEDY, prompt_lookup_num_tokens=3)
    helped, _ = routed(model, method, batch, **oracle.GREEDY, assistant_model=tiny.build(family, seed=1))
    for run in (lookup, helped):
        assert torch.equal(run.sequences, greedy.sequences)
        assert (run.logits - greedy.logits).abs().max() < TOLERANCE


@families
def test_a_cache_copied_and_cut_stays_right(family):
    spec, method = tiny.BATCHES["ragged"], trained(family)
    batch, model = tiny.inputs(family, **spec), tiny.build(family)
    with foveate.prune(model, method):
        first = oracle.run(model, batch, max_new_tokens=6)
        turn = tiny.next_turn(model, batch, first.sequences)
        expected = oracle.run(model, turn | {tiny.CACHE: copy.deepcopy(first.cache)}, max_new_tokens=4)
        cut = copy.deepcopy(first.cache)
        cut.crop(-3)
        again = oracle.run(model, turn | {tiny.CACHE: cut}, max_new_tokens=4)
    assert (again.logits - expected.logits).abs().max() < TOLERANCE


@families
def test_an_image_at_the_prompts_end(family):
    """The last token may skip layers, too, but then a method that reads it there has nothing to read."""
    batch, method = tiny.inputs(family, text=(0,), between=0), trained(family, 1)
    if family == "qwen2_5_vl":
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            batch[name] = batch[name][:, :-1]  # the word behind every picture
    assert batch["input_ids"][0, -1] == tiny.IMAGE
    run, _ = routed(tiny.build(family), method, batch, **oracle.GREEDY)
    logits, _ = Dense(family, method).logits(batch, image_spans(family, batch, (1,)), run.sequences)
    assert (logits - run.logits).abs().max() < TOLERANCE
    if family != "llava_next":  # whose pictures end with a newline token, which goes through
        with pytest.raises(foveate.UnsupportedError, match="ends with an image token that skips layer 1"):
            routed(tiny.build(family), [method, foveate.VisualSnapKV()], batch, **oracle.GREEDY)


@families
@batches
def test_flash_attention_runs_on_what_goes_through(family, batch, monkeypatch):
    kernel, spec, method = Flash(), tiny.BATCHES[batch], trained(family)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", kernel)
    batch = tiny.inputs(family, **spec)
    run, report = routed(flash_model(family), method, batch, **oracle.GREEDY)
    logits, _ = Dense(family, method).logits(batch, image_spans(family, batch, spec["images"]), run.sequences)
    assert (logits - run.logits).abs().max() < TOLERANCE
    prompts = [queries for queries, _ in kernel.lengths if queries > 1]
    assert prompts == [layer.kept_length for layer in report.layers] and prompts[1] < prompts[0]


def test_half_precision_runs():
    batch, model = tiny.inputs("llava", **tiny.BATCHES["ragged"]), tiny.build("llava").to(torch.bfloat16)
    whole, _ = routed(tiny.build("llava"), trained("llava"), batch, max_new_tokens=1)
    half, _ = routed(model, trained("llava"), batch, max_new_tokens=1)
    assert half.cache.layers[1].keys.dtype == torch.bfloat16
    assert (half.logits - whole.logits).abs().max() < 0.5


# What cannot be right ----------------------------------------------------------------------------------------


def test_what_cannot_be_right_is_refused():
    model = tiny.build("llava")
    with pytest.raises(foveate.UnsupportedError, match="needs weights that were trained on this very model"):
        foveate.prune(model, "videollm_mod")
    with pytest.raises(foveate.UnsupportedError, match="trained on another model"):
        foveate.prune(tiny.build("llava", seed=1), trained("llava"))
    with pytest.raises(ValueError, match=r"trained with keep=0.25, not keep=0.5"):
        foveate.prune(model, VideoLLMMoD(keep=0.5, layers=(1, 3), weights=trained("llava").weights))
    with pytest.raises(ValueError, match=r"layers must be ascending and in \[0, 3\] for this model, got 1, 4"):
        foveate.prune(model, "videollm_mod", router="random", layers=(1, 4))
    with pytest.raises(foveate.UnsupportedError, match=r"by what layer 1 shows.* in front of layer 1 or 3, or route"):
        foveate.prune(model, [foveate.FastV(layer=2), VideoLLMMoD(router="random")])
    with pytest.raises(foveate.UnsupportedError, match="acts around layers of the LLM, which mllama does not offer"):
        foveate.prune(tiny.build("mllama"), "videollm_mod", router="random")
    assert not model._forward_hooks and not model.model._forward_hooks, "nothing was left behind"


def test_layers_that_borrow_keys_and_values_are_not_routed_and_those_that_lend_may_be():
    """Gemma 4 E: the last two of six layers read what layers 2 and 3 hold."""
    model, batch = tiny.build("gemma4_e"), tiny.inputs("gemma4_e", **tiny.BATCHES["ragged"])
    with pytest.raises(foveate.UnsupportedError, match=r"layers 5 of this .* route 1, 3 alone, by `layers`"):
        foveate.prune(model, "videollm_mod", router="random")
    with pytest.raises(foveate.UnsupportedError, match="route earlier ones"):
        foveate.prune(model, "videollm_mod", router="random", layers=(4, 5))
    foveate.prune(model, "videollm_mod", router="random", keep=1.0).remove()
    found = prove(model, batch, [VideoLLMMoD(keep=0.5, router="random", layers=(1, 3))], steps=4)
    assert found.holds and not found.blind and not found.faults
