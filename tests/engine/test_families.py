"""Families beyond the core: a sample of the matrix for each, all of it under `-m slow`; and what a layout must be."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import oracle
import pytest
import tiny
import torch
from cases import IN_CROSS_ATTENTION, METHODS, SAMPLED, TOLERANCE, check_second_turn, prune, pruned_run, relative_errors
from sampling import pairwise, taking_turns

import foveate
from foveate.engine.support import find_target

OTHERS = [name for name in tiny.DECODER_FAMILIES if name not in tiny.CORE]
BACKENDS = ["eager", "sdpa"]
others = pytest.mark.parametrize("family", OTHERS)


def rows():
    """For each of these families, a few methods with the rest in turn; slow: all methods, in pairs with the rest."""
    factors = list(tiny.BATCHES), list(oracle.DECODING), BACKENDS
    few = set(taking_turns(OTHERS, SAMPLED, *factors))
    more = pairwise([name for name in METHODS if name not in IN_CROSS_ATTENTION], *factors)
    slow = [(family, *row) for family, row in product(OTHERS, sorted(more)) if (family, *row) not in few]
    return [*sorted(few), *(pytest.param(*row, marks=pytest.mark.slow) for row in slow)]


@contextlib.contextmanager
def unless_upstream_fails(family, batch, **kwargs):
    """Skip what the untouched model gets wrong: in beams, a prompt must give the logits that it gives alone."""
    try:
        yield
    except Exception:
        try:
            run, once = (oracle.run(tiny.build(family), batch, **more) for more in (kwargs, dict(max_new_tokens=1)))
        except Exception as error:
            pytest.skip(f"this release of transformers cannot repeat {family} prompts: {error}")
        copies = kwargs.get("num_beams", kwargs.get("num_return_sequences", 1))
        if (run.logits[:, 0] - once.logits[run.rows // copies, 0]).abs().max() > TOLERANCE:
            pytest.skip(f"this release of transformers gives repeated {family} prompts each other's images")
        raise


@pytest.mark.parametrize(("family", "name", "batch", "decoding", "attn"), rows())
@pytest.mark.sampled(5)
def test_logits_equal_the_dense_reference(family, name, batch, decoding, attn):
    batch = tiny.inputs(family, **tiny.BATCHES[batch])
    with unless_upstream_fails(family, batch, **oracle.DECODING[decoding]):
        check(family, name, batch, attn, **oracle.DECODING[decoding])


def check(family, name, batch, attn, **kwargs):
    rates = METHODS[name][1].get("rates")
    if rates is not None and len(rates) + 1 != tiny.config(family).get_text_config().num_hidden_layers:
        pytest.skip("rates for the layers of a model of another depth")
    if METHODS[name][0] in tiny.found[family].refused:
        with pytest.raises(foveate.UnsupportedError, match="use a method"):
            pruned_run(tiny.build(family, attn), name, batch, **kwargs)
        return
    run, report = pruned_run(tiny.build(family, attn), name, batch, **kwargs)
    assert any(kept < tokens for row in report.images for tokens, kept in row), "nothing was pruned"
    error = relative_errors(family, batch, run, report)
    assert error.max() < TOLERANCE, [f"{e:.1e}" for e in error.tolist()]


@others
def test_keeping_everything_changes_nothing_at_all(family):
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    with unless_upstream_fails(family, batch, **oracle.BEAMS):
        untouched = oracle.run(model, batch, **oracle.BEAMS)
        with prune(model, "random", keep=1.0):
            run = oracle.run(model, batch, **oracle.BEAMS)
    assert torch.equal(run.sequences, untouched.sequences)
    assert torch.equal(run.logits, untouched.logits)


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2_vl"])
def test_the_short_reference_sees_a_wrong_choice(family):
    batch = tiny.inputs(family)
    run, report = pruned_run(tiny.build(family), "fopru_rank", batch, **oracle.GREEDY)
    shifted = [replace(layer, kept=layer.kept.roll(1, -1)) for layer in report.layers]
    wrong = oracle.short_errors(tiny.build(family), batch, run, SimpleNamespace(layers=shifted))
    assert wrong.max() > 1e-2


def with_a_method_each(names: tuple[str, ...] = ("fastv", "plphp", "random")):
    """Each family with one of these methods, in turn; slow with all of them."""
    for number, (family, name) in enumerate(product(OTHERS, names)):
        turn = number // len(names) % len(names) == number % len(names)
        yield pytest.param(family, name, marks=[] if turn else pytest.mark.slow)


@pytest.mark.parametrize(("family", "name"), list(with_a_method_each()))
def test_a_second_turn_with_a_new_image(family, name):
    if "state" in find_target(tiny.build(family)).kinds:
        name = "plphp"  # the reference goes on behind a state that no mask can make forget
    batch = tiny.inputs(family, **tiny.BATCHES["ragged"])
    hides, later = check_second_turn(tiny.build(family), name, batch, image=True)
    assert any(hide.keys[..., batch["input_ids"].shape[1] + 6 :].any() for hide in hides), "the new image was pruned"
    assert all(later.images)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), list(with_a_method_each()))
def test_guesses_from_the_prompt_give_what_greedy_decoding_gives(family, name):
    batch, model = tiny.inputs(family, text=(30,)), tiny.build(family)
    ids = batch["input_ids"]
    ids[:, -10:] = ids[:, -20:-10] = ids[:, -30:-20]
    try:
        oracle.run(model, batch, **oracle.GREEDY, prompt_lookup_num_tokens=3)
    except (ValueError, IndexError) as error:
        pytest.skip(f"the untouched model cannot: {error}")
    with prune(model, name):
        greedy = oracle.run(model, batch, **oracle.GREEDY)
        guessed = oracle.run(model, batch, **oracle.GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy.sequences, guessed.sequences)
    assert (greedy.logits - guessed.logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["fopru_rank", "fastv", "plphp"])
def test_guesses_from_the_prompt_where_layers_see_chunks_equal_the_dense_reference(name):
    """Llama 4, whose chunked layers hold more while there are guesses."""
    batch, model = tiny.inputs("llama4", text=(30,)), tiny.build("llama4")
    ids = batch["input_ids"]
    ids[:, -10:] = ids[:, -20:-10] = ids[:, -30:-20]
    with prune(model, name) as pruned:
        greedy = oracle.run(model, batch, **oracle.GREEDY)
        guessed = oracle.run(model, batch, **oracle.GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy.sequences, guessed.sequences)
    assert (greedy.logits - guessed.logits).abs().max() < TOLERANCE
    assert relative_errors("llama4", batch, guessed, pruned.report).max() < TOLERANCE
    assert any(layer.kept_length < layer.length for layer in pruned.report.layers)
