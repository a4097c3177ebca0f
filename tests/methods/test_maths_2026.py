"""The maths of methods of 2026 that are neither greedy nor a sum of rows, against slow, obvious re-implementations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import groups_of, slow_topk
from test_maths_cache import HEADS, KV_HEADS, Slow, layouts, ragged
from test_maths_layers import Layer, budget_of
from torch import Tensor

import foveate
from foveate.methods.apet import ApET, farthest_points, joined, reconstruction_error
from foveate.methods.budgets import floor_budget
from foveate.methods.host import Host
from foveate.methods.mixkv import MixKV, stretched, unlikeness
from foveate.methods.prefixkv import PrefixKV, prefix_budgets, share_before
from foveate.methods.tokens import EncoderTokens
from foveate.methods.v2drop import V2Drop, variation
from foveate.methods.visual_snapkv import VisualSnapKV

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 1 << 30)
DEVICE = torch.device("cpu")


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ApET --------------------------------------------------------------------------------------------------------


def slow_farthest(states: list[list[float]], steps: int, start: int) -> list[int]:
    picked = [start]
    while len(picked) < steps:
        others = [i for i in range(len(states)) if i not in picked]
        picked.append(max(others, key=lambda i: (min(math.dist(states[i], states[j]) for j in picked), -i)))
    return picked


def slow_error(states: Tensor, basis: list[int]) -> list[float]:
    """The length of what the combination with the least squares, and squared weights times 1e-5, leaves out."""
    rows = states[basis].double()
    # Ridge regression is least squares with one more row for each weight.
    left = torch.cat([rows.T, 1e-5**0.5 * torch.eye(len(basis), dtype=torch.float64)])
    out = []
    for token in states.double():
        weights = torch.linalg.lstsq(left, torch.cat([token, torch.zeros(len(basis), dtype=torch.float64)])).solution
        out.append(float((token - rows.T @ weights).norm()))
    return out


@few
@given(st.integers(1, 12), st.data())
def test_apet_spreads_its_basis_and_measures_what_it_leaves_out(n, data):
    states, steps = noise(data.draw(seeds), 2, n, 5), data.draw(st.integers(1, n))
    start = torch.tensor([data.draw(st.integers(0, n - 1)), 0])
    basis = farthest_points(states, steps, start)
    for tile in range(2):
        assert basis[tile].tolist() == slow_farthest(states[tile].tolist(), steps, int(start[tile]))
        error = reconstruction_error(states, basis)[tile]
        torch.testing.assert_close(
            error.double(), torch.tensor(slow_error(states[tile], basis[tile].tolist())).double(), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("budget", [1, 2, 5, 9, 20])
@pytest.mark.parametrize("options", [dict(), dict(seed=3), dict(slots="weakest"), dict(merge_dropped=True)])
@pytest.mark.parametrize("options_too", [dict(basis=4), dict(basis=40, slots="weakest", merge_dropped=True)])
def test_apet_keeps_the_unexplained_and_the_basis(budget, options, options_too):
    n, method = 20, ApET(**(options | options_too))
    states, weight = noise(budget, 2, n, 7), noise(1, 7, 6)
    features = (states @ weight).tanh()
    tokens = EncoderTokens(
        (4, 5), 2, DEVICE, states=states, features=features, project=lambda x: (x @ weight).tanh(), most=budget
    )
    chosen = method.select(tokens, torch.tensor([budget, 1]))
    assert chosen.sum(-1).tolist() == [budget, 1]
    merged = method.merge(tokens, chosen)
    assert (merged is None) == method.only_drops
    for tile, count in ((0, budget), (1, 1)):
        own, size = states[tile], min(method.basis, n)
        if method.seed is None:
            start = max(range(n), key=lambda i: float(own[i].norm()))
        else:
            start = int(torch.randint(n, (1,), generator=torch.Generator().manual_seed(method.seed)))
        basis = slow_farthest(own.tolist(), size, start)
        error = reconstruction_error(own[None], torch.tensor([basis]))[0].tolist()
        paid = min(size, count - 1)
        if method.slots == "own":
            beside = basis[:paid]
            values = [-math.inf if i in beside else e for i, e in enumerate(error)]
            best = [i for i, yes in enumerate(slow_topk(values, count - paid)) if yes]
        else:
            best = [i for i, yes in enumerate(slow_topk(error, count - paid)) if yes]
            beside = [i for i, yes in enumerate(slow_topk(error, count)) if yes and i not in best]
        assert chosen[tile].nonzero().flatten().tolist() == sorted([*best, *beside])
        if merged is None:
            continue
        becomes = {i: own[i].double() for i in [*best, *beside]}
        if method.merge_dropped:
            unit = own.double() / own.double().norm(dim=-1, keepdim=True)
            parts = {i: [own[i].double()] for i in best}
            for i in set(range(n)) - {*best, *beside}:
                parts[max(best, key=lambda j: (float(unit[i] @ unit[j]), -j))].append(own[i].double())
            becomes |= {i: torch.stack(part).mean(0) for i, part in parts.items()}
        if method.slots == "weakest":
            becomes |= {slot: own[b].double() for slot, b in zip(sorted(beside), basis, strict=False)}
        for i, state in becomes.items():
            torch.testing.assert_close(merged[tile, i].double(), (state @ weight.double()).tanh(), rtol=1e-4, atol=1e-4)


def test_apet_joins_in_chunks_as_at_once():
    states, takes = noise(4, 2, 30, 5), noise(5, 2, 30) > 0.5
    whole = joined(states, takes, ~takes)
    torch.testing.assert_close(joined(states, takes, ~takes, chunk_elements=200), whole)
    nobody = torch.zeros_like(takes)
    assert torch.equal(joined(states, nobody, ~nobody), states)


def test_apet_basis_explains_itself():
    states = noise(6, 1, 12, 16)
    basis = farthest_points(states, 5, torch.tensor([0]))
    error = reconstruction_error(states, basis)[0]
    assert error[basis[0]].max() < 1e-3 < 0.1 < error.mean()


@pytest.mark.parametrize("options", [dict(basis=0), dict(seed=-1), dict(slots="none")])
def test_apet_names_what_is_wrong(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ApET(**options)


# V2Drop ------------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("measure", ["l2", "cosine"])
def test_v2drop_keeps_what_a_layer_changed_most(layout, left, measure):
    layer, method = Layer(layout, seed=8, left=left), V2Drop(keep=0.2, measure=measure)
    for stage in range(3):
        tokens = layer.tokens(stage)
        scores = []
        for b, slots in layer.images:
            before, behind = ([layer.state(states, b, k) for k in slots] for states in (layer.entered, layer.leaves))
            pairs = list(zip(before, behind, strict=True))
            if measure == "l2":
                scores.append([math.dist(x, y) for x, y in pairs])
            else:
                dots = [sum(a * c for a, c in zip(x, y, strict=True)) for x, y in pairs]
                scores.append([1 - d / math.hypot(*x) / math.hypot(*y) for d, (x, y) in zip(dots, pairs, strict=True)])
        expected = layer.best(scores, budget_of(method, tokens).tolist())
        assert layer.chosen(method.select(tokens), tokens) == expected


def test_v2drop_stages_are_those_of_the_authors_at_the_same_depth():
    assert V2Drop().stages(32) == (3, 17, 22) and V2Drop().stages(6) == (1, 3, 4)
    authors = V2Drop(keep=0.001, earlier=(0.5, 0.25))
    groups = groups_of([576])
    left = []
    for stage in range(3):
        tokens = replace(Layer(("taaat",)).tokens(stage), groups=groups)
        left.append(int(authors.stage_budget(tokens)))
    assert left == [288, 144, 1]
    with pytest.raises(ValueError, match="measure"):
        V2Drop(measure="l1")
    assert torch.equal(variation(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), "l2"), torch.full((1, 2), 3**0.5))


# MixKV -------------------------------------------------------------------------------------------------------


def with_values(slow: Slow, seed: int = 3):
    tokens = slow.tokens()
    return replace(tokens, value=noise(seed, *tokens.key.shape[:3], 5))


def slow_stretch(values: list[float], like: list[float]) -> list[float]:
    low, high = min(values), max(values)
    equal = high - low <= 1e-6 * max(abs(low), abs(high))
    unit = [0.0 if equal else (v - low) / (high - low) for v in values]
    mean = sum(unit) / len(unit)
    return [u * (sum(like) / len(like)) / mean if mean else 0.0 for u in unit]


@layouts
@pytest.mark.parametrize("mix", ["headwise", "equal"])
def test_mixkv_mixes_attention_values_and_unlike_keys(layout, mix):
    slow = Slow(layout, seed=2)
    tokens = with_values(slow)
    attention = VisualSnapKV(window=6, kernel=3).score(tokens)
    rows = []
    for g, (b, slots) in enumerate(slow.images):
        heads = []
        for h in range(KV_HEADS):
            looked = attention[g, h, : len(slots)].tolist()
            unit = [(tokens.key[b, h, k].double() / tokens.key[b, h, k].double().norm()) for k in slots]
            mean = torch.stack(unit).mean(0)
            away = [-float(u @ mean / mean.norm()) for u in unit]
            diverse = slow_stretch(away, looked)
            heavy = slow_stretch([float(tokens.value[b, h, k].double().norm()) for k in slots], looked)
            pairs = [float(u @ v) for i, u in enumerate(unit) for j, v in enumerate(unit) if i != j]
            alike = min(1.0, max(0.0, sum(pairs) / len(pairs))) if pairs else 1.0
            if mix == "equal":
                heads.append([(a + d + v) / 3 for a, d, v in zip(looked, diverse, heavy, strict=True)])
            else:
                parts = zip(looked, diverse, heavy, strict=True)
                heads.append([alike * d + (1 - alike) * (a + v) for a, d, v in parts])
        rows.append(heads)
    score = MixKV(window=6, kernel=3, mix=mix).score(tokens)
    assert score.shape == (len(slow.images), KV_HEADS, tokens.slots.shape[1])
    for g, heads in enumerate(rows):
        size = len(heads[0])
        torch.testing.assert_close(score[g, :, :size].double(), torch.tensor(heads).double(), rtol=1e-4, atol=1e-6)
        assert (score[g, :, size:] == -math.inf).all()


def test_mixkv_weighs_diversity_where_keys_are_alike():
    present = torch.ones(1, 1, 6, dtype=torch.bool)
    same, apart = torch.ones(1, 1, 6, 8), torch.eye(8)[:6][None, None]
    assert unlikeness(same, present)[1].item() == pytest.approx(1) and unlikeness(apart, present)[1].item() < 1e-6
    assert (stretched(torch.ones(1, 1, 6), present, torch.rand(1, 1, 6)) == 0).all()
    with pytest.raises(ValueError, match="mix"):
        MixKV(mix="none")


# PrefixKV ----------------------------------------------------------------------------------------------------


def slow_prefixes(layers: list[list[float]], total: int) -> list[int]:
    """Raise one share for all layers until as many tokens are needed as may stay."""
    before = []
    for importance in layers:
        ordered, whole = sorted(importance, reverse=True), sum(importance)
        before += [sum(ordered[:o]) / whole for o in range(len(ordered))]
    level = sorted(before)[total - 1]
    counts = []
    for importance in layers:
        ordered, whole = sorted(importance, reverse=True), sum(importance)
        counts.append(sum(sum(ordered[:o]) / whole <= level + 1e-12 for o in range(len(ordered))))
    return counts


@few
@given(st.integers(1, 5), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.data())
def test_prefixkv_finds_the_share_that_all_layers_reach(layers, counts, data):
    rng, groups = torch.Generator().manual_seed(data.draw(seeds)), groups_of(counts)
    method, n = PrefixKV(keep=data.draw(st.floats(0.1, 0.9))), max(counts)
    scores = [ragged([(torch.rand(c, generator=rng) ** 3).tolist() for c in counts]) for _ in range(layers)]
    statistics = torch.stack([method.statistics(each, groups) for each in scores])
    assert statistics.shape == (layers, n, len(counts))
    budgets = method.budgets(statistics, groups)
    each = floor_budget(method.share(groups), groups)
    assert torch.equal(budgets.sum(0), layers * each) and (budgets >= 1).all() and (budgets <= groups.count).all()
    for g, count in enumerate(counts):
        slow = slow_prefixes([s[g, 0, :count].tolist() for s in scores], int(layers * each[g]))
        found = budgets[:, g].tolist()
        # A share that two tokens reach at once leaves one of them out.
        assert sum(slow) >= sum(found) and all(abs(a - b) <= 1 for a, b in zip(slow, found, strict=True))
        if sum(slow) == sum(found):
            assert slow == found


def test_prefixkv_gives_little_to_layers_that_look_at_little():
    sharp, flat = torch.tensor([[0.97, 0.01, 0.01, 0.01]]), torch.full((1, 4), 0.25)
    before = torch.stack([share_before(sharp), share_before(flat)])
    assert prefix_budgets(before, torch.tensor([4])).flatten().tolist() == [1, 3]


def test_prefixkv_profiles_share_out_keep():
    groups = groups_of([20, 10])
    budgets = PrefixKV(keep=0.25, profile=[1, 3, 0.5]).budgets(torch.zeros(3, 20, 2), groups)
    assert budgets.tolist() == [[3, 2], [10, 4], [2, 1]] or torch.equal(budgets.sum(0), torch.tensor([15, 6]))
    assert torch.equal(budgets.sum(0), torch.tensor([15, 6])) and budgets[1, 0] >= 3 * budgets[0, 0] - 1
    host = Host("llava", 4, 8, DEVICE, str)
    with pytest.raises(ValueError, match="3 shares, and the model has 4 layers"):
        PrefixKV(profile=(1.0, 3.0, 0.5)).for_host(host)
    for options in (dict(profile=()), dict(profile=(0,)), dict(rows=0)):
        with pytest.raises(ValueError, match=next(iter(options))):
            PrefixKV(**options)
    method = PrefixKV(keep=3, profile=[1, 2], rows=8)
    assert foveate.Method.from_dict(method.to_dict()) == method


@layouts
@pytest.mark.parametrize("count", [None, 1, 3, 100])
def test_some_rows_stand_for_all(layout, count):
    """Read at an even stride, the last among them; as many as there are is all of them."""
    slow = Slow(layout, seed=4)
    tokens = slow.tokens()
    for b, row in enumerate(slow.rows):
        own = [k for k in range(slow.past, slow.keys) if row[k] != "."]
        some = (
            own
            if count is None
            else sorted({own[-1 - i * len(own) // min(count, len(own))] for i in range(min(count, len(own)))})
        )
        at = torch.full((len(slow.rows), len(some)), -1)
        at[b] = torch.tensor(some) - slow.past
        expected = tokens.received(at)[b] * len(own) / len(some)
        torch.testing.assert_close(tokens.received_from_all(count)[b], expected, rtol=1e-4, atol=1e-5)
    assert tokens.received_from_all(count).shape == (len(slow.rows), HEADS, slow.keys)
