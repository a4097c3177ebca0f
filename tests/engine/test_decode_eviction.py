"""Eviction while decoding evicts one slot of all rows: rows must not notice each other, nor outlive the method."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch

import foveate

TOLERANCE = 1e-4


def alone(batch: dict, row: int) -> dict:
    """One sample with one image, without its padding."""
    real = batch["attention_mask"][row].bool()
    out = {key: value[row : row + 1] for key, value in batch.items()}
    return out | {key: out[key][:, real] for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("options", [{"keep": 0.5}, {"keep": 1000}, {"keep": 4}, {"keep": 4, "decode_distance": 3}])
def test_rows_of_a_padded_batch_are_as_they_are_alone(options):
    """Also where nothing is dropped from the prefill, and where prompts are shorter than the distance."""
    model, batch = tiny.build("llava"), tiny.inputs("llava", images=(1, 1, 1), text=(4, 14, 9))
    with foveate.prune(model, "elastic_cache", **options):
        together = oracle.run(model, batch, max_new_tokens=16)
        for row in range(3):
            single = oracle.run(model, alone(batch, row), max_new_tokens=16)
            assert torch.equal(single.sequences[0, -16:], together.sequences[row, -16:])
            assert (single.logits[0] - together.logits[row]).abs().max() < TOLERANCE


def test_a_prompt_shorter_than_the_distance_loses_nothing_until_as_much_is_held():
    model, batch = tiny.build("llava"), tiny.inputs("llava", text=(6,))
    with foveate.prune(model, "elastic_cache", keep=4, decode_distance=25) as pruned:
        cache = oracle.run(model, batch, max_new_tokens=9).cache
        kept = pruned.report.layers[0].kept_length
    assert kept < 17
    assert cache.layers[0].physical == kept + 8, "eight steps, and still below 25"


def test_batches_and_turns_in_which_rows_would_move_are_refused():
    model, batch = tiny.build("llava"), tiny.inputs("llava", images=(1, 0), text=(6, 9))
    with (
        foveate.prune(model, "elastic_cache", keep=0.5),
        pytest.raises(foveate.UnsupportedError, match="have an image"),
    ):
        oracle.run(model, batch, max_new_tokens=4)
    with foveate.prune(model, "elastic_cache", keep=0.5, decode_distance=None):
        oracle.run(model, batch, max_new_tokens=4)

    batch = tiny.inputs("llava", images=(1, 1), text=(6, 9))
    with foveate.prune(model, "elastic_cache", keep=0.5):
        first = oracle.run(model, batch, max_new_tokens=4)
        turn = tiny.next_turn(model, batch, first.sequences, False)
        turn["attention_mask"][0, -3] = 0  # padded in front of the last two tokens of its new turn
        before = [layer.physical for layer in first.cache.layers]
        with pytest.raises(foveate.UnsupportedError, match="padded"):
            oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=4)
        assert [layer.physical for layer in first.cache.layers] == before


def test_eviction_ends_with_its_method():
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    with foveate.prune(model, "elastic_cache", keep=0.5, decode_distance=3):
        first = oracle.run(model, batch, max_new_tokens=4)
    held = first.cache.layers[0].physical
    turn = tiny.next_turn(model, batch, first.sequences, False)
    new = turn["input_ids"].shape[1] - first.cache.layers[0].length
    with foveate.prune(model, "fopru", keep=0.5):
        second = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=4)
    assert second.cache.layers[0].physical == held + new + 3
