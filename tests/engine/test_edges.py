"""Unusual but legal use: what a stranger tried, and what went wrong once."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import tiny
import torch
from cases import PLACES, prune, pruned_run
from slow import layer_tokens

import foveate
from foveate.engine.cache import active
from foveate.engine.watching import _before_layer
from foveate.methods.attention import attention_marginals

decoder_places = pytest.mark.parametrize(("family", "name"), [p for p in PLACES if p[0] != "mllama"])


def test_scores_survive_large_float16_activations():
    """The product of raw queries and keys overflows where the scaled one, as the kernel computes it, does not."""
    query, key = torch.full((1, 2, 1, 128), 25.0).half(), torch.full((1, 2, 5, 128), 25.0).half()
    assert layer_tokens(query, key, 128**-0.5).last_attention().isfinite().all()
    assert all(part.isfinite().all() for part in attention_marginals(key, key, 128**-0.5, 0))


@decoder_places
def test_generate_with_logits_to_keep_is_no_assisted_decoding(family, name):
    batch, model = tiny.inputs(family), tiny.build(family)
    plain, _ = pruned_run(model, name, batch, **oracle.GREEDY)
    more, report = pruned_run(model, name, batch, **oracle.GREEDY, logits_to_keep=5)
    assert torch.equal(plain.sequences, more.sequences)
    assert report.layers[0].length == batch["input_ids"].shape[1]


def test_the_base_model_alone_is_refused():
    with pytest.raises(foveate.UnsupportedError, match="whole model"):
        foveate.prune(tiny.build("llava").model, "fopru")


def test_models_that_share_a_decoder_are_not_both_pruned():
    batch, one, two = tiny.inputs("llava"), tiny.build("llava"), tiny.build("llava", seed=1)
    two.model.language_model = one.model.language_model
    expected, _ = pruned_run(one, "plphp", batch, max_new_tokens=4)
    with prune(one, "plphp"):
        with pytest.raises(foveate.UnsupportedError, match="shares"):
            prune(two, "plphp")
        assert torch.equal(oracle.run(one, batch, max_new_tokens=4).logits, expected.logits)


@decoder_places
def test_a_refused_forward_inside_a_forward_costs_nothing(family, name):
    batch, model = tiny.inputs(family), tiny.build(family)
    with prune(model, name), torch.no_grad():
        expected = model(**batch).logits
        refused = []

        def intrude(*_):
            if not refused:
                refused.append(True)
                with pytest.raises(foveate.UnsupportedError):
                    model(**batch, output_attentions=True)

        handle = model.model.language_model.layers[1].register_forward_hook(intrude)
        assert torch.equal(model(**batch).logits, expected) and refused
        handle.remove()


def test_an_interrupt_leaves_nothing_behind():
    batch, model = tiny.inputs("llava"), tiny.build("llava")

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), prune(model, "fopru_rank"):
        handle = model.model.language_model.layers[1].register_forward_hook(interrupt)
        try:
            model(**batch)
        finally:
            handle.remove()
    assert active.forward is None


def test_a_count_of_tokens_is_exact_for_large_images():
    from test_maths import groups_of

    from foveate.methods.base import floor_budget

    for total in (576, 2552, 5268):
        groups = groups_of([total], [0])
        for keep in (1, total // 2 - 1, total - 1, total, total + 5):
            assert floor_budget(foveate.FastV(keep=keep).share(groups), groups).item() == min(keep, total)


def test_features_can_be_asked_for_as_a_tuple():
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    expected = model.get_image_features(batch["pixel_values"], return_dict=False)
    with prune(model, "fopru_rank"):
        got = model.get_image_features(batch["pixel_values"], return_dict=False)
    assert isinstance(got, tuple) and len(got) == len(expected)


def test_gradient_checkpointing_is_refused():
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    model.activation_checkpointing_enable()
    model.train()
    with prune(model, "fopru_rank"), pytest.raises(foveate.UnsupportedError, match="checkpointing"):
        model(**batch)


def test_a_prompt_that_ends_in_its_image_still_attends_under_zipvl():
    """The last row becomes the next token, so it must not fall silent although it is an image token."""
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    end = int((batch["input_ids"][0] == tiny.IMAGE).nonzero()[-1]) + 1
    batch |= {key: batch[key][:, :end] for key in ("input_ids", "attention_mask")}
    with foveate.prune(model, "zipvl", keep=0.25, record=True) as pruned, torch.no_grad():
        model(**batch, use_cache=True)
    assert all(layer.seen[0, 0, -1] for layer in pruned.report.layers)


def test_hooks_of_another_thread_may_go_while_a_layer_runs_its_own():
    """Torch reads which hooks take keyword arguments while they are called, when this one's are gone already."""
    assert _before_layer(object(), True, 0, tiny.build("llava"), (torch.zeros(1),)) is None


def test_numbers_of_other_kinds_and_sizes():
    assert foveate.FastV(keep=np.int64(5)).keep == 5 and type(foveate.FastV(keep=np.int64(5)).keep) is int
    assert type(foveate.FoPru(keep=np.float32(0.5)).keep) is float
    with pytest.raises(ValueError, match="alpha must be"):
        foveate.TopV(alpha=float("inf"))
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    untouched = oracle.run(model, batch, max_new_tokens=2)
    for name in ("uniform", "fastv", "plphp"):
        with foveate.prune(model, name, keep=10**30):
            assert torch.equal(oracle.run(model, batch, max_new_tokens=2).logits, untouched.logits)
