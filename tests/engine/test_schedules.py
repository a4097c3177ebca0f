"""Methods with a rate for every layer leave in each layer what its rate says, also nothing at all."""

from __future__ import annotations

import math

import oracle
import pytest
import tiny
import torch
from cases import METHODS, TOLERANCE, image_tokens, prune, pruned_run
from oracle import hidden
from test_oracle import kept_per_image
from traces import changes, snapshot

import foveate

SCHEDULED = [name for name, (method, _) in METHODS.items() if method in ("gsearch", "psigmoid")]
DEPTH = 4


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("batch", tiny.BATCHES)
def test_each_layer_sees_the_share_that_its_rate_says(family, name, batch):
    spec = tiny.BATCHES[batch]
    batch = tiny.inputs(family, **spec)
    method, options = METHODS[name]
    rates = (1.0, *foveate.get_method(method, **options).rates_at(DEPTH))
    _, report = pruned_run(tiny.build(family), name, batch, max_new_tokens=2)
    tokens = [n for row in tiny.image_counts(family, spec["images"]) for n in row]
    assert len(report.layers) == DEPTH
    for rate, kept in zip(rates, kept_per_image(report, batch, spec, family), strict=True):
        wanted = torch.tensor([max(math.floor(rate * n + 1e-4), 1) if rate else 0 for n in tokens])
        if family == "llava_next":  # newline tokens always stay
            assert (kept >= wanted).all() and (kept <= wanted + 0.3 * torch.tensor(tokens)).all()
        else:
            assert (kept == wanted).all()


@pytest.mark.parametrize("name", SCHEDULED)
def test_as_a_number_keep_is_the_mean_tokens_of_every_image(name):
    spec = tiny.BATCHES["ragged"]
    batch, model = tiny.inputs("qwen2_5_vl", **spec), tiny.build("qwen2_5_vl")
    with prune(model, name, keep=6) as pruned:
        oracle.run(model, batch, max_new_tokens=2)
    kept = torch.stack(kept_per_image(pruned.report, batch, spec, "qwen2_5_vl"))[1:, 0].float()
    tokens = torch.tensor([n for row in tiny.image_counts("qwen2_5_vl", spec["images"]) for n in row])
    assert len(set(tokens.tolist())) > 1, "images of one size prove nothing"
    assert ((kept.mean(0) <= 6) & (kept.mean(0) > 5)).all(), "rounded down in every layer"
    assert (kept.diff(dim=0) <= 0).all()


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
@pytest.mark.parametrize("rates", [(0.5, 0.0, 0.0), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("decoding", oracle.DECODING)
def test_no_image_token_at_all_equals_the_dense_reference(family, rates, decoding):
    """Also where the picture is the last thing that a prompt holds: its last token is the row that answers."""
    for spec in (tiny.BATCHES["ragged"], dict(text=(0,), between=0)):
        batch, model = tiny.inputs(family, **spec), tiny.build(family)
        with foveate.prune(model, "gsearch", rates=rates, record=True) as pruned:
            run = oracle.run(model, batch, **oracle.DECODING[decoding])
        length = batch["input_ids"].shape[1]
        assert oracle.errors(tiny.build(family, "eager"), batch, run, hidden(pruned.report, length)).max() < TOLERANCE
        assert pruned.report.layers[-1].kept[:, :, -1].all(), "the last row of a prompt stays"
        if family != "llava_next":  # newline tokens stay
            kept = pruned.report.layers[-1].kept[:, 0]
            images = image_tokens(batch).repeat_interleave(len(kept) // len(batch["input_ids"]), dim=0)
            assert not (kept & images)[:, :-1].any()


@pytest.mark.parametrize("rates", [(0.5, 0.25), (1, 0.75, 0.5, 0.25)])
def test_a_schedule_for_another_depth_is_refused(rates):
    model = tiny.build("llava")
    before = snapshot(model)
    said = rf"{len(rates)} rates are for a model of {len(rates) + 1} layers, this one has 4: give 3 rates, or search"
    with pytest.raises(ValueError, match=said):
        foveate.prune(model, "gsearch", rates=rates)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("name", SCHEDULED)
def test_only_layers_where_the_rate_falls_are_stages(name):
    method, options = METHODS[name]
    made = foveate.get_method(method, **options)
    rates = (1.0, *made.rates_at(DEPTH))
    assert made.stages(DEPTH) == tuple(layer for layer in range(1, DEPTH) if rates[layer] < rates[layer - 1])
