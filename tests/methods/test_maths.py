"""The methods' maths against slow, obvious re-implementations, ties and edges included."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import groups_of, layer_tokens, slow_map, slow_topk

from foveate.engine.rows import compact
from foveate.methods.attention import attention_marginals, received_by_features
from foveate.methods.base import floor_budget, scaled_layers, token_budget, topk_mask
from foveate.methods.baselines import Random, strided
from foveate.methods.fastv import FastV, received_attention
from foveate.methods.fopru import FoPru, significance, top_rows
from foveate.methods.plphp import PLPHP, layer_classes, retention_rates
from foveate.methods.selection import apportion
from foveate.methods.tokens import EncoderTokens
from foveate.methods.trimmed_llama import TrimmedLlama, union_of_heads

few = settings(max_examples=60, deadline=None)
# Coarse scores, so that ties are common.
scores = st.lists(st.integers(0, 4).map(float), min_size=1, max_size=24)
keeps = st.one_of(st.floats(0.01, 1.0), st.integers(1, 40))


@few
@given(scores, st.integers(0, 30))
def test_topk_takes_the_largest_and_the_earlier_of_equals(values, k):
    mask = topk_mask(torch.tensor([values]), torch.tensor([k]))
    assert mask[0].tolist() == slow_topk(values, k)


def test_topk_never_takes_what_may_not_be_chosen():
    mask = topk_mask(torch.tensor([[1.0, -math.inf, 0.0, -math.inf]]), 3)
    assert mask.tolist() == [[True, False, True, False]]


@few
@given(st.floats(0.001, 1.0), st.integers(1, 5000))
def test_a_fraction_keeps_the_floor_and_never_nothing(keep, tokens):
    kept = token_budget(keep, tokens)
    assert 1 <= kept <= tokens
    assert kept == 1 or kept <= keep * tokens + 1e-5
    assert kept + 1 > keep * tokens - 1e-5


@pytest.mark.parametrize(
    ("keep", "tokens", "kept"),
    [(0.29, 100, 29), (0.25, 576, 144), (0.1, 5, 1), (1.0, 7, 7), (64, 576, 64), (64, 10, 10), (1, 9, 1)],
)
def test_budgets(keep, tokens, kept):
    assert token_budget(keep, tokens) == kept


@few
@given(keeps, st.lists(st.tuples(st.integers(1, 60), st.integers(0, 6)), min_size=1, max_size=4))
def test_the_engine_and_the_methods_agree_on_budgets(keep, images):
    groups = groups_of([n for n, _ in images], [p for _, p in images])
    fast = floor_budget(FastV(keep=keep).share(groups), groups).tolist()
    for budget, (count, pinned) in zip(fast, images, strict=True):
        slow = min(max(token_budget(keep, count + pinned) - pinned, 1), count)
        assert abs(budget - slow) <= (isinstance(keep, float) and abs(keep * (count + pinned) % 1 - 1) < 1e-3)


@few
@given(st.lists(st.integers(1, 31), min_size=1, max_size=4, unique=True).map(sorted), st.integers(2, 60))
def test_layers_of_a_paper_find_their_place_in_any_depth(layers, depth):
    scaled = scaled_layers(tuple(layers), 32, depth)
    assert list(scaled) == sorted(set(scaled)) and all(1 <= layer < depth for layer in scaled)
    assert depth != 32 or list(scaled) == layers
    assert scaled, "one always fits"


@few
@given(st.integers(0, 60), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_tiles_share_a_budget_in_proportion(total, sizes):
    shares = apportion(total, sizes)
    assert all(1 <= share <= size for share, size in zip(shares, sizes, strict=True))
    assert sum(shares) == min(max(total, len(sizes)), sum(sizes)), "no part's 1 comes on top"
    if len(sizes) <= total <= sum(sizes):
        exact = [total * size / sum(sizes) for size in sizes]
        assert all(s <= max(1, e + 1) + 1e-9 for s, e in zip(shares, exact, strict=True))
        if min(exact) >= 1:
            assert all(s > e - 1 - 1e-9 for s, e in zip(shares, exact, strict=True))


@few
@given(st.data())
def test_compaction_keeps_order_and_fills_on_the_left(data):
    heads, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    kept = [data.draw(st.integers(0, n)) for _ in range(2)]
    mask = torch.zeros(2, heads, n, dtype=torch.bool)
    for b in range(2):
        for h in range(heads):
            mask[b, h, data.draw(st.permutations(range(n)))[: kept[b]]] = True
    choice = compact(mask, torch.ones_like(mask))
    if bool(mask.all()):
        assert choice is None
        return
    for b in range(2):
        for h in range(heads):
            chosen = choice.source[b, h][choice.real[b, h]].tolist()
            assert chosen == mask[b, h].nonzero().flatten().tolist()
            assert choice.real[b, h].tolist() == sorted(choice.real[b, h].tolist())
            assert len(set(choice.source[b, h].tolist())) == choice.source.shape[-1]
    assert choice.ragged == bool((~choice.real).any())


def test_compaction_fills_up_heads_that_keep_fewer_and_says_that_they_differ():
    mask = torch.tensor([[[True, False, False], [True, False, True]]])
    choice = compact(mask, torch.ones(1, 2, 3, dtype=torch.bool))
    assert choice.source.shape == (1, 2, 2) and choice.uneven
    assert choice.real.tolist() == [[[False, True], [True, True]]]
    assert choice.source[0, 0, 1] == 0 and choice.source[0, 1].tolist() == [0, 2]


# Attention scores --------------------------------------------------------------------------------------------


def test_attention_of_chosen_rows_is_that_of_the_whole_map():
    """Causal, behind earlier keys, with invisible ones; every row, in any order, and padding gives zeros."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 11, 8)
    visible = torch.rand(2, 11) > 0.3
    visible[:, 0] = True
    tokens = layer_tokens(query, key, 0.3, visible)
    rows = torch.tensor([[4, 0, 2], [1, -1, 3]])
    fast = tokens.attention(rows)
    for b in range(2):
        hidden = ~visible[b] | (torch.arange(11) > torch.arange(5)[:, None] + 6)
        whole = slow_map(query[b], key[b], 0.3, torch.where(hidden, -torch.inf, 0.0))
        for r, row in enumerate(rows[b].tolist()):
            torch.testing.assert_close(fast[b, :, r], whole[:, row] if row >= 0 else torch.zeros(4, 11))
    for chunk in (1, 1 << 24):
        weights = torch.rand(2, 3)
        total = (fast * weights[:, None, :, None]).sum(2)
        torch.testing.assert_close(tokens.received(rows, weights, chunk), total)
    torch.testing.assert_close(tokens.received(rows), fast.sum(2))
    assert torch.equal(tokens.last_attention(), tokens.attention(tokens.last[:, None])[:, :, 0, :10])


def test_the_last_rows_stop_at_padding():
    query, key = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8)
    visible = torch.tensor([[True] * 4, [False, False, True, True]])
    tokens = layer_tokens(query, key, 1.0, visible)
    assert tokens.recent(3).tolist() == [[1, 2, 3], [-1, 2, 3]]
    assert tokens.recent(9).tolist() == [[0, 1, 2, 3], [-1, -1, 2, 3]]


def test_marginals_of_packed_and_padded_pictures_are_those_of_each_alone():
    query, key = (torch.randn(1, 2, 7, 8) for _ in range(2))
    alone = [attention_marginals(query[:, :, part], key[:, :, part], 0.5, 0) for part in (slice(3), slice(3, 7))]
    sees = torch.zeros(1, 7, 7, dtype=torch.bool)
    sees[:, :3, :3] = sees[:, 3:, 3:] = True
    for packed, parts in zip(attention_marginals(query, key, 0.5, 0, 2, sees), zip(*alone, strict=True), strict=True):
        assert torch.allclose(packed, torch.cat(parts, 1))
    sees = torch.ones(1, 7, 7, dtype=torch.bool)
    sees[:, :, 3:] = False  # padding is seen by nobody, and looks all the same
    for padded, part in zip(attention_marginals(query, key, 0.5, 0, 2, sees), alone[0], strict=True):
        assert torch.allclose(padded[:, :3], part) and not padded[:, 3:].any()


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 24])
def test_marginals_are_those_of_the_whole_map(prefix, chunk):
    torch.manual_seed(1)
    query, key = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 8)
    received, given_ = attention_marginals(query, key, 0.5, prefix, chunk)
    for b in range(2):
        patches = slow_map(query[b], key[b], 0.5).mean(0)[prefix:, prefix:]
        torch.testing.assert_close(received[b], patches.mean(0))
        torch.testing.assert_close(given_[b], patches.mean(1))


@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
def test_features_receive_the_sum_over_text_rows(chunk):
    torch.manual_seed(2)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8)
    low = torch.finfo(torch.float32).min
    mask = torch.where(torch.rand(2, 1, 5, 6) > 0.3, 0.0, low)
    mask[:, :, :, 5] = low
    rows = torch.tensor([[False, True, True, True, True], [True] * 5])
    total, seen = received_by_features(query, key, 0.4, mask, rows, chunk)
    for b in range(2):
        whole = slow_map(query[b], key[b], 0.4, mask[b, 0])
        torch.testing.assert_close(total[b], whole[:, rows[b]].sum(1))
        assert seen[b].tolist() == (mask[b, 0][rows[b]] == 0).any(0).tolist()


# Methods -----------------------------------------------------------------------------------------------------


def test_fopru_takes_the_vector_that_varies_more_in_each_tile():
    flat, spread = torch.full((4,), 0.25), torch.tensor([0.1, 0.4, 0.2, 0.3])
    chosen = significance(torch.stack([spread, flat, flat]), torch.stack([flat, spread, flat]))
    assert torch.equal(chosen, torch.stack([spread, spread, flat]))


@few
@given(st.integers(1, 5), st.integers(1, 5), st.floats(0.01, 1), st.integers(0, 1 << 30))
def test_fopru_rows_are_the_best_whole_rows(rows, columns, keep, seed):
    values = torch.randint(0, 3, (2, rows * columns), generator=torch.Generator().manual_seed(seed)).float()
    budget = token_budget(keep, rows * columns)
    fast = top_rows(values, torch.tensor([budget, budget]), (rows, columns))
    for tile in range(2):
        means = [sum(values[tile, r * columns : (r + 1) * columns].tolist()) / columns for r in range(rows)]
        best = slow_topk(means, max(1, budget // columns))
        assert fast[tile].tolist() == [best[i // columns] for i in range(rows * columns)]


def test_fopru_ranks_by_significance():
    tokens = EncoderTokens(
        (2, 2), 1, torch.device("cpu"), torch.tensor([[[0.1, 0.4, 0.4, 0.2]]]), torch.full((1, 1, 4), 0.2)
    )
    assert FoPru(keep=0.5).select(tokens, torch.tensor([2])).tolist() == [[False, True, True, False]]


def test_fopru_reads_the_layer_and_the_attention_it_is_told_to():
    deep, before = [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]
    received, cls = torch.tensor([[before, deep]]), torch.tensor([[before[::-1], [0.1, 0.4, 0.1, 0.4]]])
    flat, two = torch.full((1, 2, 4), 0.25), torch.tensor([2])

    def chosen(**options):
        method = FoPru(keep=0.5, **options)
        seen = {"received": received, "given": flat, "cls": cls}
        read = {name: seen[name][:, -method.vision_layers :] for name in method.reads}
        return method.select(EncoderTokens((2, 2), 1, torch.device("cpu"), **read), two)[0].nonzero().flatten().tolist()

    assert chosen() == [0, 1]
    assert chosen(back=1) == chosen(back=7) == [2, 3], "where there are fewer layers, the first there is"
    assert chosen(attention="cls") == [1, 3]
    assert chosen(attention="cls", back=1) == [0, 1]
    with pytest.raises(ValueError, match="attention must be"):
        FoPru(attention="head")
    with pytest.raises(ValueError, match="back must be"):
        FoPru(back=-1)


@few
@given(st.integers(1, 200), st.floats(0.01, 1))
def test_uniform_strides_evenly(n, keep):
    k = token_budget(keep, n)
    chosen = strided(torch.tensor([k]), n)[0].nonzero().flatten()
    assert len(chosen) == k
    gaps = chosen.diff().tolist()
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert abs(int(chosen[0]) - (n - 1 - int(chosen[-1]))) <= n / k / 2 + 1, "centred"


def test_random_is_seeded_and_keeps_its_budget():
    tokens = EncoderTokens((4, 4), 3, torch.device("cpu"))
    budget = torch.tensor([4, 4, 7])
    one, two = (Random(keep=0.25, seed=seed).select(tokens, budget) for seed in (0, 1))
    assert one.sum(-1).tolist() == [4, 4, 7]
    assert torch.equal(one, Random(keep=0.25, seed=0).select(tokens, budget)) and not torch.equal(one, two)
    assert torch.equal(one[0], one[1]), "a picture keeps the same tokens wherever it stands"


def test_fastv_averages_heads_and_keeps_each_images_share():
    torch.manual_seed(3)
    groups = groups_of([6, 4], [0, 2])
    attention = torch.rand(2, 3, 6).masked_fill((groups.positions < 0).unsqueeze(1), -torch.inf)
    chosen = FastV(keep=0.5).select(SimpleNamespace(groups=groups, last_attention=lambda: attention))
    for g, (count, budget) in enumerate([(6, 3), (4, 1)]):
        mean = [sum(attention[g, h, i].item() for h in range(3)) / 3 for i in range(count)]
        assert chosen[g].tolist() == slow_topk(mean, budget) + [False] * (6 - count)
    assert received_attention(attention).shape == (2, 6)


def slow_class(score: float, alpha: float, beta: float) -> int:
    if score >= alpha:
        return 1
    return -1 if score < beta else 0


@few
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0, 1), st.floats(0, 1))
def test_plphp_classes_follow_the_thresholds(mass, one, other):
    alpha, beta = max(one, other), min(one, other)
    fast = layer_classes(torch.tensor(mass, dtype=torch.float64).unsqueeze(1), alpha, beta)[:, 0]
    assert fast.tolist() == [slow_class(m, alpha, beta) for m in mass]


@few
@given(st.lists(st.integers(0, 3).map(float), min_size=1, max_size=40))
def test_plphp_terciles_balance(mass):
    classes = layer_classes(torch.tensor(mass).unsqueeze(1), None, None)[:, 0].tolist()
    third = len(mass) // 3
    assert classes.count(1) == classes.count(-1) == third
    order = sorted(range(len(mass)), key=lambda i: (-mass[i], i))
    assert all(classes[i] == 1 for i in order[:third])
    assert all(classes[i] == -1 for i in order[len(mass) - third :])


@few
@given(st.floats(0.01, 1), st.floats(0, 1))
def test_plphp_rates_stay_in_range_and_balance(keep, delta):
    up, middle, down = retention_rates(torch.tensor([[1], [0], [-1]]), torch.tensor([keep]), delta)[:, 0].tolist()
    assert 0 < down <= middle <= up <= 1 + 1e-6
    assert math.isclose(middle, keep, rel_tol=1e-5) and math.isclose((up + down) / 2, keep, rel_tol=1e-4)
    room = min(delta, 1 - keep, keep / 2)
    assert math.isclose(up, keep + room, rel_tol=1e-4)


def test_plphp_mean_retention_is_keep_whatever_the_attention_level():
    groups = groups_of([576], [0])
    for level in (1e-6, 0.01, 0.5):
        mass = torch.rand(30, 1, generator=torch.Generator().manual_seed(4)) * level
        budgets = PLPHP(keep=0.4, delta=0.3).budgets(mass.unsqueeze(1), groups)
        assert abs(budgets.float().mean() / 576 - 0.4) < 0.002
        assert len(budgets.unique()) == 3


def test_plphp_gives_every_head_its_own_tokens():
    attention = torch.tensor([[[0.1, 0.5, 0.4], [0.6, 0.1, 0.3]]])
    chosen = PLPHP().select(attention, torch.tensor([2]))
    assert chosen.tolist() == [[[False, True, True], [True, False, True]]]


@few
@given(st.integers(1, 4), st.integers(1, 12), st.floats(0.05, 1), st.integers(0, 1 << 30))
def test_trimmed_llama_is_the_union_of_the_heads_favourites(heads, n, keep, seed):
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randint(0, 4, (2, heads, n), generator=generator).float()
    valid = torch.rand(2, n, generator=generator) > 0.3
    chosen = TrimmedLlama(keep=keep).select(attention, valid, torch.tensor([1, 1]))
    for b in range(2):
        allowed = valid[b].nonzero().flatten().tolist()
        k = max(1, math.floor(keep * len(allowed) + 1e-4))
        union: set[int] = set()
        for head in range(heads):
            union |= set(sorted(allowed, key=lambda i: (-attention[b, head, i].item(), i))[:k])
        assert set(chosen[b].nonzero().flatten().tolist()) == union


def test_trimmed_llama_counts_tokens_per_image():
    attention, valid = torch.rand(1, 1, 8), torch.ones(1, 8, dtype=torch.bool)
    assert TrimmedLlama(keep=3).select(attention, valid, torch.tensor([2])).sum() == 6
    assert union_of_heads(attention, ~valid, torch.tensor([3])).sum() == 0
