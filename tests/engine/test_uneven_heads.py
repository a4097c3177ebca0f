"""Heads that keep differently many tokens: one KV cache, as wide as its widest head, and masks for the rest."""

from __future__ import annotations

import json
from dataclasses import dataclass

import oracle
import pytest
import tiny
import torch
from cases import TOLERANCE, check_second_turn, image_tokens, prune, pruned_run
from oracle import Hide, hidden
from test_flash import flash, flash_model  # noqa: F401
from traces import changes, snapshot

import foveate
from foveate.engine.rows import compact
from foveate.methods.base import CacheMethod

decoders = pytest.mark.parametrize("family", tiny.CORE_DECODERS)
backends = pytest.mark.parametrize("attn", ["eager", "sdpa"])
batches = pytest.mark.parametrize("batch", tiny.BATCHES)
FAR = 1e-2


@dataclass
class Descending(CacheMethod):
    """The first head of layer l keeps l + 1 tokens, every other head two more than the one before."""

    summary, source, name = "a test", "a test", "descending"
    keep: float | int = 0.5

    def budget(self, scores, tokens):
        head = torch.arange(scores.shape[1])
        return (tokens.layer + 1 + 2 * head).expand(len(scores), -1)


def test_entries_of_uneven_heads_stand_at_the_end():
    mask = torch.tensor([[[1, 0, 1, 1], [0, 0, 0, 1]], [[0, 1, 0, 0], [1, 1, 0, 0]]]).bool()
    choice = compact(mask, torch.ones_like(mask))
    assert choice.uneven and choice.ragged
    where = torch.where(choice.real, choice.source, -1).tolist()
    assert where == [[[0, 2, 3], [-1, -1, 3]], [[-1, -1, 1], [-1, 0, 1]]]
    even = compact(mask[:, :1], torch.ones_like(mask[:, :1]))
    assert even.ragged and not even.uneven


@decoders
@backends
@pytest.mark.parametrize("decoding", oracle.DECODING)
@pytest.mark.sampled(3)
def test_a_method_of_ones_own_may_give_each_head_a_number(family, attn, decoding):
    batch = tiny.inputs(family, **tiny.BATCHES["ragged"])
    with foveate.prune(tiny.build(family, attn), Descending(), record=True) as pruned:
        run = oracle.run(pruned.model, batch, **oracle.DECODING[decoding])
    report, length = pruned.report, batch["input_ids"].shape[1]
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hidden(report, length)).max() < TOLERANCE
    if family != "llava_next":  # newline tokens stay, too
        for layer in report.layers:
            assert (layer.kept[0] & image_tokens(batch)[0]).sum(-1).tolist() == [layer.index + 1, layer.index + 3]


@decoders
@backends
@batches
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.sampled(4)
def test_a_second_turn_equals_the_dense_reference(family, attn, batch, image):
    batch = tiny.inputs(family, **tiny.BATCHES[batch])
    hides, _ = check_second_turn(tiny.build(family, attn), "sparsemm", batch, image)
    assert any((hide.keys.sum(-1) != hide.keys.sum(-1)[:, :1]).any() for hide in hides)


@decoders
@pytest.mark.sampled(2)
def test_guesses_that_are_taken_back_leave_every_head_its_own(family):
    batch, model = tiny.inputs(family), tiny.build(family)
    with prune(model, "sparsemm"):
        greedy = oracle.run(model, batch, **oracle.GREEDY)
        lookup = oracle.run(model, batch, **oracle.GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy.sequences, lookup.sequences)


@pytest.mark.parametrize("beside", ["fastv", "dart", "psigmoid", "fopru"])
@backends
@pytest.mark.sampled(2)
def test_a_method_beside_it_reads_what_each_head_still_holds(beside, attn):
    """In a later turn a layer method sees a cache whose heads hold other places, some of them none."""
    model, dense = tiny.build("llava", attn), tiny.build("llava", "eager")
    batch = tiny.inputs("llava", **tiny.BATCHES["ragged"])
    methods = [foveate.get_method(beside, keep=0.5), foveate.SparseMM(keep=0.5, heads="random", window=8)]
    with foveate.prune(model, methods, record=True) as pruned:
        first = oracle.run(model, batch, max_new_tokens=4, suppress_tokens=[tiny.IMAGE])
        hides = oracle.seen_and_kept(pruned.report, batch["input_ids"].shape[1])
        turn = tiny.next_turn(model, batch, first.sequences, image=True)
        second = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=6)
        later = pruned.report
    _, cache = oracle.dense_logits(dense, batch, first.sequences, hides)
    hides = hides + oracle.seen_and_kept(later, turn["input_ids"].shape[1])
    assert oracle.errors(dense, turn | {tiny.CACHE: cache}, second, hides).max() < TOLERANCE


# Negative controls: each of these is a mistake, and the oracle must see it --------------------------------


def as_wide_as_the_widest(hides: list[Hide]) -> list[Hide]:
    """The fillers of narrower heads, the newest dropped entries, attended to."""
    wrong = []
    for hide in hides:
        keys = hide.keys.clone()
        missing = keys.sum(-1) - keys.sum(-1).amin(-1, keepdim=True)
        for row, head in missing.nonzero().tolist():
            dropped = keys[row, head].nonzero().flatten()
            keys[row, head, dropped[-int(missing[row, head]) :]] = False
        wrong.append(Hide(hide.layer, keys, hide.first_query))
    return wrong


MISTAKES = {
    "fillers attended to": as_wide_as_the_widest,
    "heads exchanged": lambda hides: [Hide(h.layer, h.keys.flip(1), h.first_query) for h in hides],
    "one head for all": lambda hides: [Hide(h.layer, h.keys[:, :1], h.first_query) for h in hides],
    "shifted by one": lambda hides: [Hide(h.layer, h.keys.roll(1, -1), h.first_query) for h in hides],
    "from the start": lambda hides: [Hide(h.layer, h.keys) for h in hides],
}


@decoders
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_oracle_sees_a_wrong_mask(family, mistake):
    batch = tiny.inputs(family)
    run, report = pruned_run(tiny.build(family), "sparsemm", batch, **oracle.GREEDY)
    hides = MISTAKES[mistake](hidden(report, batch["input_ids"].shape[1]))
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() > FAR


# What is kept, and what is stored -------------------------------------------------------------------------


@decoders
@batches
def test_the_budget_is_met_over_all_heads_and_the_report_says_what_is_stored(family, batch):
    spec = tiny.BATCHES[batch]
    batch, model = tiny.inputs(family, **spec), tiny.build(family)
    with prune(model, "sparsemm", keep=0.25) as pruned:
        run = oracle.run(model, batch, max_new_tokens=1)
        report = pruned.report
    kept, tokens = torch.stack([layer.kept for layer in report.layers]), image_tokens(batch)
    of_images = (kept & tokens[:, None]).sum(-1).float().mean((0, 2))
    counts = [sum(row) for row in tiny.image_counts(family, spec["images"])]
    if family != "llava_next":  # newline tokens stay, too
        assert of_images.tolist() == [count / 4 for count in counts]
    widths = kept.sum(-1)
    assert (widths != widths[..., :1]).any(), "heads keep other numbers"
    assert [layer.kept_length for layer in report.layers] == widths.amax((1, 2)).tolist()
    each = 2 * 4 * run.cache.layers[0].keys.shape[-1]
    assert report.uneven_heads and report.kv_bytes_kept == int(widths.sum()) * each < report.kv_bytes
    assert json.loads(json.dumps(report.to_dict()))["kv_bytes_kept"] == report.kv_bytes_kept
    assert "of it kept and the rest room for each layer's widest head" in str(report)


def test_an_even_cache_keeps_all_it_stores_but_for_shorter_samples():
    model = tiny.build("llava")
    _, report = pruned_run(model, "plphp", tiny.inputs("llava"), max_new_tokens=1)
    assert report.kv_bytes_kept == report.kv_bytes and not report.uneven_heads and "widest" not in str(report)
    _, report = pruned_run(model, "plphp", tiny.inputs("llava", **tiny.BATCHES["ragged"]), max_new_tokens=1)
    assert report.kv_bytes_kept < report.kv_bytes and not report.uneven_heads and "widest" not in str(report)


@backends
def test_equal_scores_are_visual_snapkv_to_the_last_bit(attn):
    batch, model = tiny.inputs("llava", **tiny.BATCHES["ragged"]), tiny.build("llava", attn)
    even = foveate.SparseMM(keep=0.5, kernel=1).holding({"heads": torch.ones(4, 4)})
    runs = []
    for method in (even, foveate.VisualSnapKV(keep=0.5, kernel=1)):
        with foveate.prune(model, method):
            runs.append(oracle.run(model, batch, **oracle.GREEDY))
    assert torch.equal(runs[0].logits, runs[1].logits)


# Refusals -------------------------------------------------------------------------------------------------


def test_flash_attention_is_refused_before_anything_changes(flash):  # noqa: F811
    model = flash_model("llava")
    before = snapshot(model)
    with pytest.raises(foveate.UnsupportedError, match=r"sparsemm lets each head keep another number.*sdpa"):
        prune(model, "sparsemm")
    assert changes(before, snapshot(model)) == []


def test_flash_attention_is_refused_when_it_is_switched_on_later(flash):  # noqa: F811
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    with prune(model, "sparsemm"):
        expected = oracle.run(model, batch, max_new_tokens=3)
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(foveate.UnsupportedError, match="sparsemm lets each head"):
            oracle.run(model, batch, max_new_tokens=3)
        model.set_attn_implementation("sdpa")
        assert torch.equal(oracle.run(model, batch, max_new_tokens=3).logits, expected.logits)


def test_flash_attention_never_reads_an_uneven_cache(flash):  # noqa: F811
    """Not even where a method did not say that its heads differ."""
    with foveate.prune(flash_model("llava"), Descending()) as pruned:  # noqa: SIM117
        with pytest.raises(foveate.UnsupportedError, match="heads of this KV cache keep differently many"):
            oracle.run(pruned.model, tiny.inputs("llava"), max_new_tokens=3)


def test_a_method_that_reads_one_place_in_all_heads_refuses_an_uneven_cache():
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    with prune(model, "sparsemm"):
        first = oracle.run(model, batch, max_new_tokens=3, suppress_tokens=[tiny.IMAGE])
    turn = tiny.next_turn(model, batch, first.sequences, image=True)
    with foveate.prune(model, "last_step", keep=0.5, dense_layers=0):  # noqa: SIM117
        with pytest.raises(foveate.UnsupportedError, match="keep differently many"):
            oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=3)


def test_without_scores_the_way_to_them_is_named():
    model = tiny.build("llava")
    before = snapshot(model)
    with pytest.raises(foveate.UnsupportedError, match=r"python training/sparsemm\.py"):
        foveate.prune(model, "sparsemm")
    with pytest.raises(foveate.UnsupportedError, match="of 3 layers of 4 heads, and this decoder has 4 layers of 4"):
        foveate.prune(model, foveate.SparseMM().holding({"heads": torch.ones(3, 4)}))
    assert changes(before, snapshot(model)) == []
