"""Decoders with sliding windows: the window counts all tokens, whatever was dropped, and layers hold what it holds."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from cases import BEFORE_LLM, TOLERANCE, check_second_turn, prune, pruned_run
from oracle import hidden

import foveate
from foveate.engine.attention import Attention

pytestmark = pytest.mark.sampled(5)

# Where all layers see a window, only what is dropped before the LLM counts.
FITS = [("llava_sliding", name) for name in BEFORE_LLM]
FITS += [("llava_windows", name) for name in (*BEFORE_LLM[:1], "fastv", "pyramiddrop", "sparsevlm", "topv", "dart")]
FITS += [("llava_windows", name) for name in ("plphp", "plphp_fixed", "visual_snapkv", "csp", "aircache")]

fits = pytest.mark.parametrize(("variant", "name"), FITS)
few = pytest.mark.parametrize(("variant", "name"), [f for f in FITS if f[1] in ("fopru_rank", "fastv", "plphp")])
windowed = pytest.mark.parametrize(("variant", "name"), [f for f in FITS if f[1] in ("fopru_rank", "fastv")])
batches = pytest.mark.parametrize("batch", tiny.BATCHES)
backends = pytest.mark.parametrize("attn", ["eager", "sdpa"])


def error(variant: str, name: str, batch: dict, attn: str, **kwargs) -> float:
    run, report = pruned_run(tiny.build(variant, attn), name, batch, **kwargs)
    assert any(kept < tokens for row in report.images for tokens, kept in row), "nothing was pruned"
    hides = hidden(report, batch["input_ids"].shape[1])
    return float(oracle.errors(tiny.build(variant, "eager"), batch, run, hides).max())


@fits
@batches
@backends
def test_logits_equal_the_dense_reference(variant, name, batch, attn):
    assert error(variant, name, tiny.inputs(variant, **tiny.BATCHES[batch]), attn, **oracle.GREEDY) < TOLERANCE


@few
@backends
@pytest.mark.parametrize("decoding", ["beams", "sample"])
def test_beams_and_samples_equal_the_dense_reference(variant, name, attn, decoding):
    batch = tiny.inputs(variant, **tiny.BATCHES["ragged"])
    assert error(variant, name, batch, attn, **oracle.DECODING[decoding]) < TOLERANCE


@few
@batches
@pytest.mark.parametrize("image", [False, True], ids=["words", "image"])
def test_a_second_turn_equals_the_dense_reference(variant, name, batch, image):
    batch = tiny.inputs(variant, **tiny.BATCHES[batch])
    check_second_turn(tiny.build(variant), name, batch, image, variant)


@few
@batches
def test_what_a_layer_holds_is_what_its_window_holds(variant, name, batch):
    batch, model = tiny.inputs(variant, **tiny.BATCHES[batch]), tiny.build(variant)
    plain = oracle.run(model, batch, **oracle.GREEDY)
    with prune(model, name) as pruned:
        run = oracle.run(model, batch, **oracle.GREEDY)
    report, held = pruned.report, 0
    for layer, now, untouched in zip(report.layers, run.cache.layers, plain.cache.layers, strict=True):
        assert now.get_seq_length() == untouched.get_seq_length()
        if untouched.is_sliding:
            assert layer.kept_length == now.keys.shape[2] == tiny.found[variant].window - 1
        held += layer.kept_length
    assert report.kv_bytes == held * now.keys[:, :, :1].numel() * 2 * 4 <= report.kv_bytes_unpruned
    first = oracle.run(model, batch, max_new_tokens=1)
    assert report.kv_bytes_unpruned == sum(x.keys.numel() * 2 * 4 for x in first.cache.layers)


@few
@batches
@pytest.mark.parametrize("keep", [1.0, 1000])
@pytest.mark.parametrize("decoding", ["greedy", "beams"])
def test_keeping_everything_changes_nothing_at_all(variant, name, batch, keep, decoding):
    batch, model = tiny.inputs(variant, **tiny.BATCHES[batch]), tiny.build(variant)
    untouched = oracle.run(model, batch, **oracle.DECODING[decoding])
    with prune(model, name, keep=keep):
        assert torch.equal(oracle.run(model, batch, **oracle.DECODING[decoding]).logits, untouched.logits)


@few
def test_guessed_tokens_change_nothing(variant, name):
    batch, model = tiny.inputs(variant), tiny.build(variant)
    batch["input_ids"][:, -6:] = torch.tensor([5, 6, 7, 5, 6, 7])
    with prune(model, name):
        alone = oracle.run(model, batch, **oracle.GREEDY)
        guessed = oracle.run(model, batch, **oracle.GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(alone.sequences, guessed.sequences)
    assert (alone.logits - guessed.logits).abs().max() < TOLERANCE


def test_stages_stand_behind_a_layer_that_sees_everything():
    with prune(tiny.build("llava_windows"), "fastv", layer=1) as pruned:
        assert list(pruned._places[1].stages) == [2]
    with foveate.prune(tiny.build("llava_windows"), "pyramiddrop", keep=0.25) as pruned:
        assert pruned._places[1].stages == {1: 0, 3: 2}, (
            "this one reads the layer itself; of two in one, the later counts"
        )


@windowed
@backends
def test_the_oracle_sees_a_mask_that_is_only_causal(variant, name, attn, monkeypatch):
    monkeypatch.setattr(Attention, "own", None)
    assert error(variant, name, tiny.inputs(variant), attn, **oracle.GREEDY) > 1e-2


@windowed
def test_the_oracle_sees_a_window_that_counts_what_is_left(variant, name, monkeypatch):
    def closed_up(self):
        slots = self.key.shape[2]
        end = self.forward.past + self.forward.queries
        return torch.arange(end - slots, end).expand(len(self.key), 1, -1)

    monkeypatch.setattr(Attention, "positions", property(closed_up))
    assert error(variant, name, tiny.inputs(variant), "sdpa", **oracle.GREEDY) > 1e-2
