"""The maths of schedules, against slow, obvious re-implementations."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_maths_cache import HEADS
from test_maths_layers import Layer, groups_with, layouts

import foveate
from foveate.methods import get_method
from foveate.methods.gsearch import GSearch
from foveate.methods.psigmoid import PSigmoid, sigmoid_curve, sigmoid_rates
from foveate.methods.schedules import falls, scaled, token_layers

few = settings(max_examples=60, deadline=None)
shares = st.floats(0.001, 1)
schedules = st.lists(st.floats(0, 1), min_size=1, max_size=12).map(lambda rates: sorted(rates, reverse=True))


def slow_sigmoid(steepness: float, midpoint: float, floor: float, depth: int) -> list[float]:
    rates = []
    for layer in range(1, depth):
        x = steepness * (layer / depth - midpoint)
        rates.append(floor + (1 - floor) / (1 + math.exp(x)) if x < 700 else floor)
    return rates


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# The curves --------------------------------------------------------------------------------------------------


@few
@given(st.floats(0.1, 60), st.floats(-1, 2), st.floats(0, 1), st.integers(2, 40))
def test_the_curve_is_the_formula(steepness, midpoint, floor, depth):
    fast = sigmoid_curve(tensor(midpoint), steepness, tensor(floor), depth)[0]
    assert fast.tolist() == pytest.approx(slow_sigmoid(steepness, midpoint, floor, depth), abs=1e-9)


@few
@given(shares, st.floats(0.1, 200), st.floats(0, 0.5), st.integers(2, 40))
def test_the_midpoint_gives_the_mean_asked_for(share, steepness, floor, depth):
    """At whatever midpoint: the rates lie on one curve of the family, and their mean is the share."""
    rates = sigmoid_rates(tensor(share, 1.0), steepness, floor, depth)
    assert rates.mean(1).tolist() == pytest.approx([share, 1.0], abs=1e-6)
    assert (rates.diff(dim=1) <= 1e-12).all() and (rates >= min(floor, share) - 1e-9).all() and (rates <= 1).all()
    assert rates[1].tolist() == pytest.approx([1.0] * (depth - 1), abs=1e-12)
    logits = [math.log((rate - floor) / (1 - rate)) for rate in rates[0].tolist() if floor + 1e-6 < rate < 1 - 1e-6]
    if len(logits) == depth - 1:
        steps = [a - b for a, b in pairwise(logits)]
        assert steps == pytest.approx([steepness / depth] * len(steps), rel=1e-3, abs=1e-4)


@few
@given(schedules, shares)
def test_a_schedule_is_drawn_to_another_mean_by_one_fraction(rates, share):
    drawn = scaled(rates, tensor(share))[0].tolist()
    mean = sum(rates) / len(rates)
    assert sum(drawn) / len(drawn) == pytest.approx(share, abs=1e-9)
    assert drawn == pytest.approx(sorted(drawn, reverse=True)) and min(drawn) > -1e-9 and max(drawn) < 1 + 1e-9
    end = 0 if share < mean else 1
    way = [(now - rate) / (end - rate) for now, rate in zip(drawn, rates, strict=True) if abs(end - rate) > 1e-3]
    assert way == pytest.approx(way[:1] * len(way), abs=1e-6)


def test_every_image_is_drawn_to_its_own_mean():
    drawn = scaled((1.0, 0.5, 0.0), tensor(0.25, 0.5, 0.75))
    assert drawn.tolist() == [[0.5, 0.25, 0.0], [1.0, 0.5, 0.0], [1.0, 0.75, 0.5]]


@pytest.mark.parametrize(
    ("rates", "layers"),
    [
        ((1, 0.5, 0.5, 0.25), (2, 4)),
        ((0.9, 0.9, 0.9), (1,)),
        ((1, 1, 1), (1,)),
        ((0.5, 0.0, 0.0), (1, 2)),
        ((1 - 1e-9, 0.5, 0.5 - 1e-9), (2,)),
        (tuple(1 - 6e-7 * layer for layer in range(1, 5)), (2, 4)),
    ],
)
def test_stages_are_where_the_rate_falls(rates, layers):
    assert falls(rates) == layers


def test_token_layers_count_the_first_layer():
    assert token_layers((0.5, 0.5, 0.0)) == pytest.approx(0.5)


# The methods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rates"),
    [
        (GSearch(), (0.8, 0.6, 0.4, 0.2)),
        (GSearch(keep=0.25), (0.4, 0.3, 0.2, 0.1)),
        (GSearch(rates=(1, 0.5, 0.5, 0)), (1, 0.5, 0.5, 0)),
        (GSearch(rates=(1, 0.5, 0.5, 0), keep=0.25), (0.5, 0.25, 0.25, 0)),
        (PSigmoid(steepness=5), tuple(slow_sigmoid(5, 0.5, 0, 5))),
        (PSigmoid(keep=0.7, steepness=5, floor=0.4), tuple(slow_sigmoid(5, 0.5, 0.4, 5))),
    ],
)
def test_every_layer_behind_the_first_has_its_rate(method, rates):
    assert method.rates_at(5) == pytest.approx(rates)
    stages = method.stages(5)
    assert stages == falls(rates)
    left = 1000
    for stage, layer in enumerate(stages):
        wanted = math.floor(rates[layer - 1] * 1000 + 1e-4)
        tokens = replace(Layer(("atta",)).tokens(), groups=groups_with(1000, 1000 - left), stage=stage, depth=5)
        assert method.stage_budget(tokens).tolist() == [wanted]
        left = wanted


def test_keep_is_the_mean_of_the_rates():
    assert GSearch(rates=(1, 0.5, 0.5, 0)).keep == 0.5
    assert GSearch().keep == PSigmoid().keep == 0.5
    assert GSearch(rates=(1.0, 1.0)).keeps_all


def test_a_small_rate_leaves_one_token_and_none_at_all_leaves_none():
    tokens = replace(Layer(("atta",)).tokens(), groups=groups_with(10, 0), depth=4)
    for rates, budgets in (((0.5, 0.01, 0.01), [5, 1]), ((0.5, 0.0, 0.0), [5, 0])):
        made = [GSearch(rates=rates).stage_budget(replace(tokens, stage=stage)).tolist() for stage in (0, 1)]
        assert made == [[budget] for budget in budgets]


@layouts
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("rows", ["last", "text"])
@pytest.mark.parametrize("method", ["gsearch", "psigmoid"])
def test_tokens_are_ranked_by_the_rows_asked_for(layout, left, rows, method):
    layer = Layer(layout, left=left)
    tokens = layer.tokens(stage=3)
    made = get_method(method, keep=0.5, rows=rows)
    scores, budgets = [], []
    for b, slots in layer.images:
        asked = [layer.keys - 1] if rows == "last" else layer.text(b)
        maps = [layer.attention(b, head, row) for head in range(HEADS) for row in asked]
        scores.append([sum(each[k] for each in maps) / len(maps) for k in slots])
        rate = made.rates_at(tokens.depth)[made.stages(tokens.depth)[3] - 1]
        budgets.append(max(1, math.floor(rate * len(slots) + 1e-4)))
    assert layer.chosen(made.select(tokens), tokens) == layer.best(scores, budgets)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("gsearch", dict(rates=()), "for each layer"),
        ("gsearch", dict(rates=0.5), "for each layer"),
        ("gsearch", dict(rates="1,0.5"), "for each layer"),
        ("gsearch", dict(rates=(0.5, 0.6)), "not increase"),
        ("gsearch", dict(rates=(1.5, 0.6)), r"\[0, 1\]"),
        ("gsearch", dict(rates=(0.5, -0.1)), r"\[0, 1\]"),
        ("gsearch", dict(rates=(0.5, float("nan"))), r"\[0, 1\]"),
        ("gsearch", dict(rates=(0, 0)), "all 0"),
        ("gsearch", dict(keep=0.0), "keep"),
        ("gsearch", dict(rows="first"), "'last' or 'text'"),
        ("psigmoid", dict(steepness=0), "steepness"),
        ("psigmoid", dict(floor=-0.1), "floor"),
        ("psigmoid", dict(floor=0.5), "below keep"),
        ("psigmoid", dict(rows="first"), "'last' or 'text'"),
    ],
)
def test_bad_options_name_the_allowed_range(name, options, says):
    with pytest.raises(ValueError, match=says):
        get_method(name, **options)


# The file of a search ----------------------------------------------------------------------------------------


def written(path, method, **more):
    path.write_text(json.dumps({**method.to_dict(), **more}))
    return path


@pytest.mark.parametrize(
    "method", [GSearch(rates=(1, 0.75, 0.5), rows="text"), PSigmoid(keep=0.3, steepness=20.0, floor=0.1)]
)
def test_the_file_of_a_search_is_the_method(method, tmp_path):
    path = written(tmp_path / "schedule.json", method, search={"score": 0.9})
    assert foveate.Method.from_pretrained(path) == method
    assert get_method(method.name, schedule=path) == get_method(method.name, schedule=str(path)) == method
    assert get_method(method.name, schedule=path).to_dict() == method.to_dict(), "nothing depends on the file any more"
    other = get_method(method.name, schedule=path, keep=0.6)
    assert other.keep == 0.6 and replace(other, keep=method.keep) == method


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read the schedule .*schedule.json: No such file"),
        ("{", "is not JSON"),
        ("[1, 0.5]", "no JSON object"),
        ('{"method": "psigmoid", "keep": 0.5}', "one of psigmoid, not of gsearch"),
        ('{"rates": [1, 0.5]}', "one of None, not of gsearch"),
        ('{"method": "gsearch", "rates": [0.5, 1]}', "not increase"),
    ],
)
def test_what_is_no_schedule_is_refused(text, says, tmp_path):
    path = tmp_path / "schedule.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=says):
        get_method("gsearch", schedule=path)
