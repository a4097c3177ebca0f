"""Contrast with a reduced view: two runs of one model, against the same combination worked out by hand."""

from __future__ import annotations

import gc
import math
import weakref

import oracle
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Hide, hidden
from test_flash import flash, flash_model  # noqa: F401
from torch import Tensor
from traces import changes, snapshot
from transformers import DynamicCache, LogitsProcessor

import foveate
import foveate.engine.places.logits
from foveate.engine.adoption import new_cache
from foveate.engine.cache import PrunedLayer
from foveate.engine.places.logits import LogitsPlace
from foveate.methods.mint import contrast

families = pytest.mark.parametrize("family", tiny.CORE_DECODERS)
batches = pytest.mark.parametrize("batch", tiny.BATCHES)
backends = pytest.mark.parametrize("attn", ["eager", "sdpa"])
MINT = dict(keep=0.25, layer=2, strength=1.5, plausibility=0.05)
STEPS = 7
DECODING = {
    "greedy": dict(do_sample=False),
    "beams": dict(do_sample=False, num_beams=3, num_return_sequences=2),
    "sample": dict(do_sample=True, num_return_sequences=2),
    "beam sample": dict(do_sample=True, num_beams=3),
}


def by_hand(full: list[float], reduced: list[float], strength: float, plausibility: float, amplify: str) -> list[float]:
    """The contrast of two rows of logits, number by number."""

    def probabilities(logits: list[float]) -> list[float]:
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        return [w / sum(weights) for w in weights]

    p, q = probabilities(full), probabilities(reduced)
    mixed = []
    for a, b in zip(p, q, strict=True):
        towards, away = (b, a) if amplify == "reduced" else (a, b)
        plausible = a > 0 and a >= plausibility * max(p) * (1 - 1e-6)
        mixed.append((1 + strength) * math.log(towards) - strength * math.log(away) if plausible else -math.inf)
    total = math.log(sum(math.exp(x) for x in mixed))
    return [x - total for x in mixed]


class ByHand(LogitsProcessor):
    """Both views from whole runs of an untouched eager model, without a cache that anybody reorders."""

    def __init__(self, family: str, batch: dict, hides: list[Hide], amplify: str = "reduced"):
        self.dense, self.batch, self.hides, self.amplify = tiny.build(family, "eager"), batch, hides, amplify

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # One token more, so that the replay comes to the step that is asked for.
        sequences = torch.cat([input_ids, torch.full_like(input_ids[:, :1], 5)], dim=1)
        state = torch.get_rng_state()
        full, reduced = (
            oracle.dense_logits(self.dense, self.batch, sequences, hides)[0][:, -1].tolist()
            for hides in ([], self.hides)
        )
        torch.set_rng_state(state)
        options = (MINT["strength"], MINT["plausibility"], self.amplify)
        return torch.tensor([by_hand(f, r, *options) for f, r in zip(full, reduced, strict=True)])


def check(family: str, batch: dict, attn: str, amplify: str = "reduced", model=None, **decoding) -> float:
    """Compare a run with the one by hand, and return the largest difference."""
    decoding = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_scores": True} | decoding
    model = model or tiny.build(family, attn)
    with foveate.prune(model, "mint", record=True, amplify=amplify, **MINT) as pruned:
        torch.manual_seed(3)
        said = model.generate(**batch, **decoding)
    prompt = batch["input_ids"].shape[1]
    hides = hidden(pruned.report, prompt)
    assert [layer.kept_length < layer.length for layer in pruned.report.layers] == [False, False, True, True]
    torch.manual_seed(3)
    reference = tiny.build(family, "eager")
    expected = reference.generate(**batch, **decoding, logits_processor=[ByHand(family, batch, hides, amplify)])
    assert torch.equal(said.sequences, expected.sequences)
    plain = oracle.run(reference, batch, max_new_tokens=STEPS)
    assert not torch.equal(said.sequences[: len(plain.sequences)], plain.sequences), "the contrast says something else"
    worst = 0.0
    for a, b in zip(said.scores, expected.scores, strict=True):
        assert torch.equal(a.isneginf(), b.isneginf())
        worst = max(worst, float((a - b)[~a.isneginf()].abs().max()))
    assert worst < 1e-3
    return worst


# Against the dense reference -----------------------------------------------------------------


@families
@batches
@backends
@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.sampled(5)
def test_every_step_is_the_contrast_of_two_dense_runs(family, batch, decoding, attn):
    check(family, tiny.inputs(family, **tiny.BATCHES[batch]), attn, **DECODING[decoding])


@families
def test_the_other_direction(family):
    check(family, tiny.inputs(family, **tiny.BATCHES["ragged"]), "sdpa", amplify="full")


@families
def test_twins_do_not_exchange_their_caches(family):
    """Two samples with the same words and other pictures read alike, and their beams must not be mixed up."""
    batch = tiny.inputs(family, images=(1,), text=(4,))
    other = tiny.inputs(family, images=(1,), text=(4,), seed=4)
    both = {name: torch.cat([value, value]) for name, value in batch.items()}
    both["pixel_values"] = torch.cat([batch["pixel_values"], other["pixel_values"]])
    check(family, both, "sdpa", do_sample=False, num_beams=3)


@families
@batches
def test_flash(family, batch, flash):  # noqa: F811
    check(
        family, tiny.inputs(family, **tiny.BATCHES[batch]), "", model=flash_model(family), do_sample=False, num_beams=2
    )
    assert flash.lengths


@families
def test_rows_that_have_ended_do_not_disturb_the_others(family):
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    with foveate.prune(model, "mint", **MINT):
        free = model.generate(**batch, max_new_tokens=STEPS, do_sample=False)
        prompt = batch["input_ids"].shape[1]
        end = int(free[1, prompt + 1])
        ended = model.generate(**batch, max_new_tokens=STEPS, do_sample=False, eos_token_id=end)
        alone = model.generate(**batch, max_new_tokens=STEPS, do_sample=False, num_beams=2, eos_token_id=end)
    assert len(alone) == 3
    for a, b in zip(free[:, prompt:].tolist(), ended[:, prompt:].tolist(), strict=True):
        length = a.index(end) + 1 if end in a else len(b)
        assert b[:length] == a[:length]
        assert set(b[length:]) <= {tiny.PAD}


# The two views -----------------------------------------------------------------------------------


@families
@batches
def test_the_full_view_is_the_untouched_model(family, batch):
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family, "eager")
    with foveate.prune(model, "mint", **MINT):
        said = oracle.run(model, batch, **oracle.GREEDY)
        assert all(type(layer) is not PrunedLayer for layer in said.cache.layers)
    logits, _ = oracle.dense_logits(tiny.build(family, "eager"), batch, said.sequences)
    assert torch.equal(logits, said.logits)
    untouched = oracle.run(model, batch, **oracle.GREEDY)
    with foveate.prune(model, "mint", keep=0.25, strength=0.0, plausibility=0.0, amplify="full"):
        assert torch.equal(oracle.run(model, batch, **oracle.GREEDY).logits, untouched.logits)


@families
@batches
def test_the_reduced_view_holds_less_and_nothing_afterwards(family, batch, monkeypatch):
    batch, model, held, caches = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family), [], []

    def noting(config):
        cache = new_cache(config)
        caches.append(weakref.ref(cache))
        return cache

    def watch(ids, scores):
        held.append(sum(layer.bytes for layer in caches[0]().layers))
        return scores

    monkeypatch.setattr(foveate.engine.places.logits, "new_cache", noting)
    with foveate.prune(model, "mint", record=True, **MINT) as pruned:
        model.generate(**batch, max_new_tokens=2, do_sample=False, logits_processor=[watch])
    report = pruned.report
    assert held[0] < report.kv_bytes_unpruned and held[1] > held[0]
    assert report.kv_bytes == held[0] + report.kv_bytes_unpruned, "both views are held"
    assert all(0 < kept < tokens for row in report.images for tokens, kept in row)
    gc.collect()
    assert caches[0]() is None


@families
@batches
@pytest.mark.parametrize("decoding", oracle.DECODING)
def test_keeping_everything_changes_nothing_at_all(family, batch, decoding):
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family)
    untouched = oracle.run(model, batch, **oracle.DECODING[decoding])
    with foveate.prune(model, "mint", keep=1.0) as pruned:
        assert not any(isinstance(place, LogitsPlace) for place in pruned._places), "there is no second view"
        run = oracle.run(model, batch, **oracle.DECODING[decoding])
        model(**batch)
    assert torch.equal(run.logits, untouched.logits) and torch.equal(run.sequences, untouched.sequences)


def test_a_prompt_without_an_image_is_left_alone():
    model, text = tiny.build("llava"), tiny.inputs("llava", images=(0,))
    untouched = oracle.run(model, text, **oracle.BEAMS)
    with foveate.prune(model, "mint", **MINT):
        assert torch.equal(oracle.run(model, text, **oracle.BEAMS).logits, untouched.logits)
        model(**text)


def test_own_processors_act_behind_the_contrast():
    model, batch, given = tiny.build("llava"), tiny.inputs("llava"), []

    def only_seven(ids, scores):
        given.append(scores.clone())
        return torch.full_like(scores, -math.inf).index_fill(1, torch.tensor([7]), 0.0)

    with foveate.prune(model, "mint", **MINT):
        said = model.generate(**batch, max_new_tokens=3, do_sample=False, logits_processor=[only_seven])
    assert said[0, -3:].tolist() == [7, 7, 7]
    assert all(torch.allclose(s.exp().sum(-1), torch.ones(1)) and s.isneginf().any() for s in given)


def test_forbidden_tokens_stay_forbidden():
    """A minimum length hides the end before the contrast, and neither direction may bring it back."""
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    for amplify in ("reduced", "full"):
        with foveate.prune(model, "mint", amplify=amplify, **MINT | {"plausibility": 0.0}):
            free = model.generate(**batch, max_new_tokens=3, do_sample=False)
            end = int(free[0, -3])
            said = model.generate(**batch, max_new_tokens=6, min_new_tokens=4, do_sample=False, eos_token_id=end)
        assert end not in said[0, batch["input_ids"].shape[1] :][:4]


@families
def test_half_precision(family):
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family).to(torch.bfloat16)
    with foveate.prune(model, "mint", **MINT):
        assert model.generate(**batch, max_new_tokens=4, do_sample=False, num_beams=2).shape[0] == 3


# Refusals and traces -----------------------------------------------------------------------------

MODES = {
    "prompt_lookup_num_tokens": dict(prompt_lookup_num_tokens=3),
    "guidance_scale": dict(guidance_scale=2.0),
    "prefill_chunk_size": dict(prefill_chunk_size=8),
    "custom_generate": dict(custom_generate=lambda *args, **kwargs: None),
    "use_cache": dict(use_cache=False),
    "dynamic cache": dict(cache_implementation="static"),
}


@pytest.mark.parametrize("told", MODES)
def test_modes_that_cannot_be_contrasted_are_refused(told):
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    with foveate.prune(model, "mint", **MINT) as pruned:
        with pytest.raises(foveate.UnsupportedError, match=told):
            model.generate(**batch, max_new_tokens=3, **MODES[told])
        assert pruned.report is None


def test_a_plain_forward_is_refused():
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    with foveate.prune(model, "mint", **MINT):
        for _ in range(2):
            with pytest.raises(foveate.UnsupportedError, match=r"generate\(\)"):
                model(**batch)
            model.generate(**batch, max_new_tokens=2)


def test_a_cached_conversation_is_refused_and_a_fresh_cache_is_not():
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    with foveate.prune(model, "mint", **MINT):
        first = oracle.run(model, batch | {tiny.CACHE: DynamicCache()}, max_new_tokens=4)
        turn = tiny.next_turn(model, batch, first.sequences, image=True)
        with pytest.raises(foveate.UnsupportedError, match="whole conversation"):
            model.generate(**turn, **{tiny.CACHE: first.cache}, max_new_tokens=2)


def test_other_methods_are_refused_beside_it():
    model = tiny.build("llava")
    before = snapshot(model)
    for others in (["fopru", "mint"], ["mint", "plphp"], ["mint", "mint"]):
        with pytest.raises(foveate.UnsupportedError, match="mint"):
            foveate.prune(model, others)
    with pytest.raises(foveate.UnsupportedError, match="mllama"):
        foveate.prune(tiny.build("mllama"), "mint")
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(strength=-0.1), "strength"),
        (dict(plausibility=1.1), r"plausibility .*\[0, 1\]"),
        (dict(layer=0), "layer"),
        (dict(amplify="both"), "amplify"),
        (dict(keep=0.0), "keep"),
    ],
)
def test_bad_options_are_told_what_is_allowed(options, told):
    with pytest.raises(ValueError, match=told):
        foveate.MINT(**options)


@families
def test_the_model_is_as_it_was(family):
    batch, model = tiny.inputs(family), tiny.build(family)
    expected = model.generate(**batch, max_new_tokens=3)
    before = snapshot(model)
    with foveate.prune(model, "mint", **MINT):
        model.generate(**batch, max_new_tokens=3, num_beams=2)
    assert changes(before, snapshot(model)) == []
    assert torch.equal(model.generate(**batch, max_new_tokens=3), expected)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_exception_in_either_view_leaves_no_state(at):
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    model.generate(**batch, max_new_tokens=2)
    before, calls = snapshot(model), []

    class Stop(Exception):
        pass

    def stop(module, args, output):
        calls.append(1)
        if len(calls) == at:
            raise Stop

    with foveate.prune(model, "mint", **MINT):
        expected = model.generate(**batch, max_new_tokens=3, do_sample=False)
        handle = model.model.language_model.layers[3].mlp.register_forward_hook(stop)
        with pytest.raises(Stop):
            model.generate(**batch, max_new_tokens=3, do_sample=False)
        handle.remove()
        with pytest.raises(foveate.UnsupportedError):
            model(**batch)
        assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), expected)
    assert changes(before, snapshot(model)) == []


def test_it_travels_as_a_file(tmp_path):
    method = foveate.MINT(keep=0.3, strength=0.5, amplify="full")
    method.save_pretrained(tmp_path)
    assert foveate.Method.from_pretrained(tmp_path) == method


# Maths --------------------------------------------------------------------------------------------

logits = st.lists(st.tuples(st.floats(-6, 6), st.floats(-6, 6)), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(logits, st.floats(0, 3), st.sampled_from([0.0, 0.1, 0.7, 1.0]), st.sampled_from(["reduced", "full"]))
def test_contrast_equals_the_slow_form(pairs, strength, plausibility, amplify):
    full, reduced = map(list, zip(*pairs, strict=True))
    rows = torch.tensor([full, reduced], dtype=torch.float64).float()
    fast = contrast(rows[:1], rows[1:], strength, plausibility, amplify)
    slow = by_hand(full, reduced, strength, plausibility, amplify)
    assert torch.allclose(fast, torch.tensor([slow]), atol=1e-3)
    shifted = contrast(rows[:1] + 3, rows[1:] - 2, strength, plausibility, amplify)
    assert torch.allclose(shifted, fast, atol=1e-3), "only differences of logits count"


def test_contrast_of_equal_views_is_the_view_without_the_implausible():
    full = torch.tensor([[2.0, 1.0, -3.0]])
    mixed = contrast(full, full + 5, 2.0, 0.1)
    assert mixed[0, 2] == -math.inf
    assert torch.allclose(mixed[0, :2], full[0, :2].log_softmax(-1))


def test_contrast_never_chooses_what_is_forbidden_and_stays_finite_in_half_precision():
    full = torch.tensor([[1.0, -math.inf, 0.5, -60000.0]])
    reduced = torch.tensor([[0.0, 5.0, 4.0, 60000.0]])
    for amplify in ("reduced", "full"):
        for strength in (0.0, 1.0):
            mixed = contrast(full.half(), reduced.half(), strength, 0.0, amplify)
            assert mixed[0, 1] == -math.inf and not mixed.isnan().any()
    assert contrast(full, reduced, 1.0, 0.1).argmax() == 2, "pushed towards the reduced view"
    assert contrast(full, reduced, 1.0, 0.1, "full").argmax() == 0, "pushed away from it"
    assert contrast(full, reduced, 1.0, 1.0).isneginf().sum() == 3, "only the most plausible is left"
