"""Budgets of each image's own: counted against slow twins, and the model as it is where all the mass is wanted."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.methods.csp import CSP
from foveate.methods.divprune import distances, farthest_first
from foveate.methods.mass import by_mass
from foveate.methods.tokens import EncoderTokens


def slow_count(weights, mass):
    total, count = 0.0, 0
    for weight in sorted(weights, reverse=True):
        if total >= mass * sum(weights):
            break
        total, count = total + weight, count + 1
    return max(count, 1)


@pytest.mark.parametrize("mass", [0.2, 0.5, 0.9, 1.0])
def test_a_cache_method_keeps_what_holds_the_mass(mass):
    torch.manual_seed(0)
    scores = torch.rand(3, 2, 2, 9).double()
    scores[1, ..., 6:] = -torch.inf
    method = by_mass(CSP(), mass)
    counts = [[float(v) for v in scores[g].clamp(min=0).sum((0, 1))] for g in range(3)]
    found = method.statistics(scores, groups=None)[0]
    assert found.tolist() == [slow_count(c, mass) for c in counts]


def test_an_encoder_method_keeps_what_holds_the_mass():
    torch.manual_seed(0)
    received, given = torch.rand(4, 1, 16).pow(4), torch.full((4, 1, 16), 1 / 16)
    tokens = EncoderTokens((4, 4), 4, received.device, received=received, given=given, most=16)
    stays = by_mass(foveate.FoPru(), 0.7).select(tokens, torch.tensor([16, 16, 2, 16]))
    expected = [slow_count(row.double().tolist(), 0.7) for row in received[:, 0]]
    assert stays.sum(1).tolist() == [expected[0], expected[1], min(2, expected[2]), expected[3]]


def test_distances_are_those_to_the_nearest_pick():
    torch.manual_seed(0)
    features = torch.randn(2, 7, 5)
    order = farthest_first(features, 7)
    far = distances(features, order)
    for tile in range(2):
        for step in range(1, 7):
            own = features[tile, order[tile, step]]
            nearest = min(1 - torch.cosine_similarity(own, features[tile, o], dim=0) for o in order[tile, :step])
            assert far[tile, order[tile, step]] == pytest.approx(float(nearest), abs=1e-5)
        assert far[tile, order[tile, 0]] == far[tile].max()


def test_it_is_written_and_read_and_refused():
    method = by_mass(foveate.FoPru(keep=0.1), 0.9)
    assert method.to_dict() == {**foveate.FoPru(keep=1.0).to_dict(), "mass": 0.9}
    again = foveate.Method.from_dict(method.to_dict())
    assert again.to_dict() == method.to_dict() and isinstance(again, foveate.FoPru) and not again.fills_budget
    assert not again.keeps_all and by_mass(again, 1.0).keeps_all
    assert by_mass(by_mass(method, 0.5), 0.3).to_dict()["mass"] == 0.3
    with pytest.raises(ValueError, match=r"mass must be a number in \(0, 1\]"):
        by_mass(method, 0)
    for name in ("fastv", "plphp", "random"):
        with pytest.raises(foveate.UnsupportedError, match="no scores of tokens that add up to a mass"):
            by_mass(foveate.get_method(name), 0.5)
