"""Decoders whose masks are more than causal: they are followed, by the kernels and by what methods read."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from cases import TOLERANCE, check_second_turn, prune, pruned_run
from oracle import hidden

import foveate
from foveate.engine.attention import Attention
from foveate.engine.masks import gather_mask, says_more

pytestmark = pytest.mark.sampled(5)

OWN = [name for name in (*tiny.FAMILIES, *tiny.VARIANTS) if tiny.found[name].both_ways or tiny.found[name].window]
BOTH_WAYS = [name for name in OWN if tiny.found[name].both_ways]
own = pytest.mark.parametrize("family", OWN)
batches = pytest.mark.parametrize("batch", tiny.BATCHES)


@own
@batches
def test_logits_equal_the_dense_reference_and_not_under_a_causal_mask(family, batch, monkeypatch):
    batch = tiny.inputs(family, **tiny.BATCHES[batch])

    def error(attn: str) -> float:
        model = tiny.build(family, attn)
        run, report = pruned_run(model, "divprune", batch, **oracle.GREEDY)
        hides = hidden(report, batch["input_ids"].shape[1])
        return float(oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() / run.logits.abs().max())

    for attn in tiny.found[family].backends:
        assert error(attn) < TOLERANCE
    monkeypatch.setattr(Attention, "own", None)
    assert error("eager") > 1e-3


@own
@batches
@pytest.mark.parametrize("name", ["divprune", "random"])
@pytest.mark.parametrize("image", [False, True], ids=["words", "image"])
def test_a_second_turn_equals_the_dense_reference(family, batch, name, image):
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family, tiny.found[family].backends[0])
    check_second_turn(model, name, batch, image, family)


@pytest.mark.parametrize("family", BOTH_WAYS)
@pytest.mark.parametrize("name", ["fastv", "plphp", "csp"])
def test_methods_read_what_the_layer_attends_to(family, name, monkeypatch):
    """Of rows in the middle of the prompt, which see later tokens, too."""
    batch, model = tiny.inputs(family), tiny.build(family, "eager")
    read = {}
    through = Attention.through

    def note(self, actions):
        mine = None
        if self.forward.groups is not None and self.forward.rows is None and self.forward.target.readable[self.index]:
            rows = torch.arange(self.query.shape[2]).expand(len(self.query), -1)
            mine = self.tokens.attention(rows)
        out = through(self, actions)
        if mine is not None:
            read[self.index] = (mine, out[1])
        return out

    monkeypatch.setattr(Attention, "through", note)
    with prune(model, name):
        model.generate(**batch, max_new_tokens=1)
    assert read
    for mine, weights in read.values():
        assert torch.allclose(mine, weights, atol=1e-5)
        assert torch.equal(mine.triu(1) > 1e-6, weights.triu(1) > 1e-6)


@own
@batches
def test_sparse_attention_equals_a_plain_model_with_silent_rows(family, batch):
    batch, attn = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.found[family].backends[0]
    model = tiny.build(family, attn)
    if family == "llava_sliding":  # no layer to act in
        with pytest.raises(foveate.UnsupportedError, match="whole prompt"):
            foveate.prune(model, "zipvl", keep=0.5)
        return
    with foveate.prune(model, "zipvl", keep=0.5, threshold=1.0, record=True) as pruned:
        run = oracle.run(model, batch, **oracle.GREEDY)
    hides, dense = hidden(pruned.report, batch["input_ids"].shape[1]), tiny.build(family, "eager")
    scale = run.logits.abs().max()
    with oracle.silenced(dense, pruned.report, run.rows):
        assert oracle.errors(dense, batch, run, hides).max() / scale < TOLERANCE
    assert oracle.errors(dense, batch, run, hides).max() / scale > 1e-3, "dropped rows that attend are a mistake"


def test_masks_that_are_only_causal_are_known_for_it():
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    causal = torch.ones(5, 5).tril().bool()
    mask = (causal & real[:, None, None]).clone()
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert not says_more(mask, real, 5) and not says_more(additive, real, 5)
    mask[0, 0, 0] = True  # a row of padding
    assert not says_more(mask, real, 5)
    assert says_more(mask, None, 5), "padding that the 2-D mask does not know"
    for row, key in ((2, 3), (4, 2)):
        other = mask.clone()
        other[0, 0, row, key] ^= True
        assert says_more(other, real, 5)
    additive[1, 0, 3, 1] = -0.5
    assert says_more(additive, real, 5), "a bias"
    assert says_more(mask[..., 1:], real, 5), "a window"


def test_a_mask_is_gathered_by_position():
    mask = torch.rand(2, 1, 4, 6) > 0.5  # of tokens 2 to 7, for the queries 4 to 7
    rows = torch.tensor([[0, 3], [1, 2]])
    keys = torch.tensor([[[-1, 1, 5, 7], [-1, 2, 3, 4]], [[0, 3, 4, 6], [2, 3, 6, 7]]])
    found = gather_mask(mask, rows, keys, 8, 4)
    assert found.shape == (2, 4, 2, 4)
    for b in range(2):
        for head in range(4):
            for i, row in enumerate(rows[b].tolist()):
                for j, key in enumerate(keys[b, head // 2].tolist()):
                    assert found[b, head, i, j] == (key >= 2 and bool(mask[b, 0, row, key - 2]))
    assert gather_mask(mask, None, keys[:, :1], 8, 4).shape == (2, 1, 4, 4)


@pytest.mark.parametrize("family", BOTH_WAYS)
def test_flash_attention_is_refused(family):
    model = tiny.build(family, "eager")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(foveate.UnsupportedError, match=r"both ways.*sdpa"):
        foveate.prune(model, "fopru", keep=0.5)
