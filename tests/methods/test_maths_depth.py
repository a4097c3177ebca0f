"""The maths of methods that let tokens skip layers, against slow loops."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.methods.baselines import strided
from foveate.methods.tokens import ImageGroups
from foveate.methods.videollm_mod import (
    VideoLLMMoD,
    evenly,
    routed_layers,
    router_logits,
    router_weight,
)


def groups_of(present: torch.Tensor) -> ImageGroups:
    positions = torch.where(present, torch.arange(present.numel()).view(present.shape), -1)
    rows = torch.zeros(len(present), dtype=torch.long)
    return ImageGroups(positions, rows, present.sum(-1), torch.zeros_like(rows))


@pytest.fixture
def present():
    """Frames of 12, 7, 12 and 1 tokens, shorter ones filled at either end."""
    present = torch.ones(4, 12, dtype=torch.bool)
    present[1, 7:] = False
    present[3, :11] = False
    return present


@pytest.mark.parametrize(
    ("insertion", "six", "four"),
    [
        ("interleaved", (1, 3, 5), (1, 3)),
        ("interleaved-deep", (3, 5), (3,)),
        ("all", (0, 1, 2, 3, 4, 5), (0, 1, 2, 3)),
        ("all-deep", (3, 4, 5), (2, 3)),
    ],
)
def test_insertions(insertion, six, four):
    assert (routed_layers(insertion, 6), routed_layers(insertion, 4)) == (six, four)
    assert VideoLLMMoD(layers=insertion).routed(6) == six


def test_a_fifth_of_the_tokens_in_every_second_layer_is_six_tenths_of_the_work():
    method, depth, tokens = VideoLLMMoD(), 6, 25
    budget = int(method.keep * tokens)
    computed = sum(budget if layer in method.routed(depth) else tokens for layer in range(depth))
    assert computed / (depth * tokens) == 0.6


def test_the_router_is_a_linear_map_and_its_weight_stays_near_one():
    rng = torch.Generator().manual_seed(0)
    states, weight, bias = (torch.randn(shape, generator=rng) for shape in ((3, 5, 8), (8,), ()))
    logits = router_logits(states.bfloat16(), weight, bias)
    assert logits.dtype == torch.float32
    for g in range(3):
        for k in range(5):
            score = sum(float(states[g, k, i].bfloat16()) * float(weight[i]) for i in range(8)) + float(bias)
            assert float(logits[g, k]) == pytest.approx(score, abs=1e-5)
            assert float(router_weight(logits)[g, k]) == pytest.approx(1 + 0.2 * math.tanh(score), abs=1e-5)
    assert torch.equal(router_weight(torch.zeros(2, 3)), torch.ones(2, 3)), "an untrained router changes nothing"


@pytest.mark.parametrize("budget", range(1, 13))
def test_an_even_stride_is_that_of_the_baseline(present, budget):
    budgets = present.sum(-1).clamp(max=budget)
    chosen = evenly(present, budgets)
    assert torch.equal(chosen.sum(-1), budgets)
    for own, there, count in zip(chosen, present, budgets, strict=True):
        assert torch.equal(own[there], strided(count[None], int(there.sum()))[0]) and not own[~there].any()


@pytest.mark.parametrize("keep", [0.2, 0.5, 3])
def test_each_frame_sends_its_own_best_through(present, keep):
    rng, method = torch.Generator().manual_seed(1), VideoLLMMoD(keep=keep)
    states, weight, bias = (torch.randn(shape, generator=rng) for shape in ((4, 12, 8), (8,), ()))
    method.__dict__["_tensors"] = {"5.weight": weight, "5.bias": bias}
    chosen, weights = method.select(states, groups_of(present), 5)
    logits = states @ weight + bias
    assert weights is not None and torch.allclose(weights, 0.2 * logits.tanh() + 1)
    for own, there, scores in zip(chosen, present, logits, strict=True):
        n = int(there.sum())
        count = max(1, min(keep, n) if isinstance(keep, int) else int(keep * n + 1e-6))
        best = sorted((k for k in range(12) if there[k]), key=lambda k: -float(scores[k]))[:count]
        assert own.nonzero().flatten().tolist() == sorted(best)


def test_a_draw_depends_on_the_layer_and_the_seed_alone(present):
    def drawn(layer, **options):
        chosen, weights = VideoLLMMoD(router="random", keep=5, **options).select(
            torch.zeros(4, 12, 8), groups_of(present), layer
        )
        assert weights is None
        return chosen

    assert torch.equal(drawn(1), drawn(1)) and torch.equal(drawn(1)[0], drawn(1)[2])
    assert not torch.equal(drawn(1), drawn(3)) and not torch.equal(drawn(1), drawn(1, seed=1))
    assert drawn(1).sum(-1).tolist() == [5, 5, 5, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(router="best"), "router must be"),
        (dict(layers="odd"), "layers must be interleaved, interleaved-deep, all, all-deep or a tuple"),
        (dict(layers=(1, -1)), "layers must be an int >= 0"),
        (dict(seed=-1), "seed must be"),
        (dict(keep=0.0), "keep must be"),
        (dict(router="random", weights="x"), "weights are of the learned router"),
    ],
)
def test_bad_options_say_what_is_allowed(options, said):
    with pytest.raises(ValueError, match=said):
        VideoLLMMoD(**options)
