"""The maths of SparseMM against slow, obvious re-implementations."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_maths_cache import KV_HEADS, Slow, close, layouts

import foveate
from foveate.methods.sparsemm import SparseMM, head_budgets, hits


def slow_shares(scores: list[int], each: int, count: int, floor: Fraction) -> list[Fraction]:
    """What each head may keep before rounding: again and again, what heads have no room for goes to the others."""
    low = max(1, math.floor(floor * each))
    share, rest, open_heads = [Fraction(0)] * len(scores), Fraction(len(scores) * (each - low)), set(range(len(scores)))
    while rest and open_heads:
        total = sum(scores[h] for h in open_heads)
        parts = {h: rest * (Fraction(scores[h], total) if total else Fraction(1, len(open_heads))) for h in open_heads}
        rest = Fraction(0)
        for head, part in parts.items():
            share[head] += part
            if share[head] >= count - low:
                rest += share[head] - (count - low)
                share[head] = Fraction(count - low)
                open_heads.discard(head)
    return [low + s for s in share]


heads = st.lists(st.integers(0, 1000), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(heads, st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=3), st.integers(0, 10))
def test_heads_keep_their_share_of_what_all_keep(scores, images, tenths):
    count = torch.tensor([max(image) for image in images])
    each = torch.tensor([min(image) for image in images])
    found = head_budgets(torch.tensor(scores).float(), each, count, tenths / 10)
    assert found.dtype == torch.int64
    for row, mean, most in zip(found.tolist(), each.tolist(), count.tolist(), strict=True):
        assert sum(row) == mean * len(scores), "`keep` is met over all heads"
        exact = slow_shares(scores, mean, most, Fraction(tenths, 10))
        assert all(abs(kept - share) < 1 + 1e-4 for kept, share in zip(row, exact, strict=True))
        assert all(1 <= kept <= most for kept in row)
        ranked = [kept for _, kept in sorted(zip(scores, row, strict=True))]
        assert all(a <= b + 1 for a, b in pairwise(ranked)), "a higher score keeps no less"


def test_what_one_head_has_no_room_for_goes_to_the_others():
    scores, each, count = torch.tensor([97.0, 2.0, 1.0, 0.0]), torch.tensor([20]), torch.tensor([40])
    # In the authors' code the first would be given 2 + 0.97 * 72 = 72 tokens, and have 40.
    assert head_budgets(scores, each, count, 0.1).tolist() == [[40, 25, 13, 2]]


def test_equal_scores_are_equal_budgets():
    each, count = torch.tensor([9, 4]), torch.tensor([36, 5])
    assert head_budgets(torch.full((6,), 0.3), each, count, 0.1).tolist() == [[9] * 6, [4] * 6]


def test_hits_count_where_the_largest_attention_shows_the_answer():
    torch.manual_seed(0)
    attention, shows = torch.rand(2, 3, 5, 8), torch.rand(2, 5, 8) < 0.4
    shows[1, 3:] = False  # rows that do not count
    for b in range(2):
        for head in range(3):
            score = 0.0
            for row, shown in zip(attention[b, head].tolist(), shows[b].tolist(), strict=True):
                score += shown[row.index(max(row))] / max(sum(shown), 1)
            assert hits(attention, shows)[b, head] == pytest.approx(score)


def test_nothing_shown_is_no_hit():
    assert torch.equal(hits(torch.rand(1, 2, 3, 4), torch.zeros(1, 3, 4, dtype=torch.bool)), torch.zeros(1, 2))


@layouts
@pytest.mark.parametrize(("window", "kernel"), [(1, 1), (4, 3), (32, 7)])
def test_the_largest_of_neighbours_scores(layout, window, kernel):
    slow = Slow(layout)
    mean = [
        [[value / len(slow.recent(b, window)) for value in head] for head in of_heads]
        for b, of_heads in enumerate(slow.per_kv_head(slow.total(lambda b: slow.recent(b, window))))
    ]
    expected = slow.of_images(mean)
    pooled = expected.clone()
    for g, (_, slots) in enumerate(slow.images):
        for h in range(KV_HEADS):
            for i in range(len(slots)):
                near = range(max(0, i - kernel // 2), min(len(slots), i + kernel // 2 + 1))
                pooled[g, h, i] = max(float(expected[g, h, j]) for j in near)
    close(SparseMM(window=window, kernel=kernel, heads="random").score(slow.tokens()), pooled)


@pytest.mark.parametrize(
    "options", [dict(floor=1.5), dict(floor=-0.1), dict(kernel=4), dict(heads="some"), dict(seed=-1), dict(window=0)]
)
def test_bad_options_are_told_what_is_allowed(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        foveate.SparseMM(**options)
    with pytest.raises(foveate.UnsupportedError, match="add up to a mass"):
        foveate.get_method("sparsemm", mass=0.5)
