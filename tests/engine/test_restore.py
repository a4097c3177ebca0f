"""Leaving the block, by whatever way, leaves no trace in the model or in transformers."""

from __future__ import annotations

import functools

import oracle
import pytest
import tiny
import torch
from cases import FITS, PLACES, prune, pruned_run
from torch import nn
from traces import changes, snapshot

pytestmark = pytest.mark.sampled(5)

places = pytest.mark.parametrize(("family", "name"), PLACES)
backends = pytest.mark.parametrize("attn", ["eager", "sdpa"])


@pytest.fixture
def world(request):
    """A model that has run once, so that lazy state exists, with its logits and its snapshot."""
    family, attn = request.param
    model, batch = tiny.build(family, attn), tiny.inputs(family)
    run = oracle.run(model, batch, max_new_tokens=4)
    before = snapshot(model)

    def untouched() -> bool:
        assert changes(before, snapshot(model)) == []
        return torch.equal(oracle.run(model, batch, max_new_tokens=4).logits, run.logits)

    return model, batch, untouched


everywhere = pytest.mark.parametrize(
    ("world", "name"),
    [((family, attn), name) for family, name in FITS for attn in ("eager", "sdpa")],
    indirect=["world"],
)
at_places = pytest.mark.parametrize(
    ("world", "name"),
    [((family, attn), name) for family, name in PLACES for attn in ("eager", "sdpa")],
    indirect=["world"],
)


@everywhere
@pytest.mark.sampled(8)
def test_leaving_the_block_restores_everything(world, name):
    model, batch, untouched = world
    with prune(model, name):
        oracle.run(model, batch, max_new_tokens=4)
        oracle.run(model, batch, max_new_tokens=4, num_beams=2)
    assert untouched()


@at_places
def test_remove_restores_everything_and_may_be_repeated(world, name):
    model, batch, untouched = world
    pruned = prune(model, name)
    oracle.run(model, batch, max_new_tokens=4)
    pruned.remove()
    assert untouched()
    pruned.remove()
    assert untouched()
    assert pruned.report.kv_bytes > 0, "the report outlives the pruning"


@at_places
def test_a_block_that_never_ran_restores_everything(world, name):
    model, _, untouched = world
    with prune(model, name):
        pass
    assert untouched()


class Stop(Exception):
    pass


@at_places
def test_an_exception_while_decoding_restores_everything(world, name):
    model, batch, untouched = world

    def stop(input_ids, scores):
        if input_ids.shape[1] > batch["input_ids"].shape[1] + 1:
            raise Stop
        return scores

    with pytest.raises(Stop), prune(model, name):
        oracle.run(model, batch, max_new_tokens=4, logits_processor=[stop])
    assert untouched()


PARTS = {
    "vision": lambda model: (
        getattr(model.model, "vision_tower", None) or getattr(model.model, "visual", None) or model.model.vision_model
    ),
    "layer 0": lambda model: model.model.language_model.layers[0].mlp,
    "layer 3": lambda model: model.model.language_model.layers[3].mlp,
    "head": lambda model: model.lm_head,
}


@at_places
@pytest.mark.parametrize("part", PARTS)
def test_an_exception_in_the_prefill_leaves_no_state(world, name, part):
    """Neither after the block nor, within it, for the next prompt."""
    model, batch, untouched = world
    expected, _ = pruned_run(model, name, batch, max_new_tokens=4)

    def stop(module, args, output):
        raise Stop

    with prune(model, name):
        handle = PARTS[part](model).register_forward_hook(stop)
        with pytest.raises(Stop):
            oracle.run(model, batch, max_new_tokens=4)
        handle.remove()
        assert torch.equal(oracle.run(model, batch, max_new_tokens=4).logits, expected.logits)
    assert untouched()


@places
@backends
def test_interleaved_blocks_of_two_models_end_in_any_order(family, name, attn):
    """The shared registry must survive the first one to leave, and be clean after the last."""
    batch = tiny.inputs(family)
    a, b = tiny.build(family, attn), tiny.build(family, attn, seed=1)
    oracle.run(a, batch, max_new_tokens=2), oracle.run(b, batch, max_new_tokens=2)
    expected, _ = pruned_run(b, name, batch, max_new_tokens=4)
    before = snapshot(a), snapshot(b)
    first, second = prune(a, name), prune(b, name)
    oracle.run(a, batch, max_new_tokens=2)
    first.remove()
    assert torch.equal(oracle.run(b, batch, max_new_tokens=4).logits, expected.logits)
    second.remove()
    assert changes(before[0], snapshot(a)) == changes(before[1], snapshot(b)) == []


@places
def test_attributes_that_were_set_before_are_set_again(family, name):
    """Somebody else may have wrapped methods of the model; theirs must survive, and work meanwhile."""
    batch, model = tiny.inputs(family), tiny.build(family)
    calls = []

    def wrap(module: nn.Module, method: str) -> None:
        original = getattr(module, method)

        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            calls.append(method)
            return original(*args, **kwargs)

        setattr(module, method, wrapped)

    wrap(model, "prepare_inputs_for_generation")
    if hasattr(model.model, "get_image_features"):
        wrap(model.model, "get_image_features")
    oracle.run(model, batch, max_new_tokens=2)
    before, expected = snapshot(model), set(calls)
    calls.clear()
    with prune(model, name):
        oracle.run(model, batch, max_new_tokens=2)
    assert set(calls) == expected
    assert changes(before, snapshot(model)) == []


@places
def test_pruning_again_after_removing_gives_the_same(family, name):
    batch, model = tiny.inputs(family), tiny.build(family)
    first, _ = pruned_run(model, name, batch, max_new_tokens=4)
    second, _ = pruned_run(model, name, batch, max_new_tokens=4)
    assert torch.equal(first.logits, second.logits)


@places
def test_a_deepcopy_made_before_is_not_pruned(family, name):
    """Only the very object that was given is pruned, not others with the same weights or config."""
    batch, model = tiny.inputs(family), tiny.build(family)
    twin = tiny.build(family)
    twin.config = model.config
    before = oracle.run(twin, batch, max_new_tokens=4)
    with prune(model, name):
        oracle.run(model, batch, max_new_tokens=4)
        assert torch.equal(oracle.run(twin, batch, max_new_tokens=4).logits, before.logits)
