"""The maths of the methods that evict by more than one row, against slow, obvious re-implementations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import groups_of, slow_topk

from foveate.methods.aircache import AirCache, elite_rows, layer_shares, strength_and_skewness
from foveate.methods.base import floor_budget
from foveate.methods.csp import CSP, split_budget, window_rows
from foveate.methods.elastic_cache import ElasticCache, nearest_kept
from foveate.methods.plphp import PLPHP
from foveate.methods.tokens import ImageGroups, LayerTokens
from foveate.methods.visual_snapkv import VisualSnapKV, pool_neighbours
from foveate.methods.zipvl import ZipVL, probes_that_see, tokens_for_mass

few = settings(max_examples=60, deadline=None)
coarse = st.integers(0, 3).map(float)
keeps = st.one_of(st.floats(0.05, 0.95), st.integers(1, 9))
HEADS, KV_HEADS, SCALING = 4, 2, 0.4

# A token a letter: "." padding, "t" text, "a" and "b" images, "n" structures an image. What comes before "|" is past.
LAYOUTS = [
    ("ttaaaaaattt",),
    ("ttaanaantttbbbbt", "......tttaaattbb"),
    ("..tttt|ttaaaaatbt", "tttttt|taaabbbbbt", "....tt|..ttaaaatt"),
    ("taaaaaaaaaaaaaaaaaaaat", "..tttaaaaaaaaaaatttttt"),
]
# "bb" at the end of a prompt: its last row counts as text, as the engine says.
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda rows: rows[0])


class Slow:
    """A layer as Python sees it: letters, and one attention map a sample worked out with loops."""

    def __init__(self, layout: tuple[str, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.past = max(row.find("|") for row in layout)
        self.past = max(self.past, 0)
        self.rows = [row.replace("|", "") for row in layout]
        self.keys = len(self.rows[0])
        self.query = (2 * torch.randn(len(layout), HEADS, self.keys - self.past, 8, generator=generator)).to(dtype)
        self.key = (2 * torch.randn(len(layout), KV_HEADS, self.keys, 8, generator=generator)).to(dtype)
        self.images = [
            (b, [k for k in range(self.past, self.keys) if row[k] == name])
            for b, row in enumerate(self.rows)
            for name in "ab"
            if name in row[self.past :]
        ]

    def logit(self, b: int, head: int, row: int, key: int) -> float:
        """`row` counts keys, too."""
        group = head * KV_HEADS // HEADS
        return float(self.query[b, head, row - self.past].double() @ self.key[b, group, key].double()) * SCALING

    def attention(self, b: int, head: int, row: int, keys: list[int] | None = None, one_more: int = 0) -> list[float]:
        """Causal softmax of one row over all tokens, or over `keys` alone."""
        allowed = [k for k in (range(self.keys) if keys is None else keys) if k <= row and self.rows[b][k] != "."]
        powers = {k: math.exp(self.logit(b, head, row, k)) for k in allowed}
        return [powers.get(k, 0.0) / (sum(powers.values()) + one_more) for k in range(self.keys)]

    def recent(self, b: int, window: int) -> list[int]:
        return [r for r in range(max(self.past, self.keys - window), self.keys) if self.rows[b][r] != "."]

    def text(self, b: int) -> list[int]:
        first = min(k for k in range(self.past, self.keys) if self.rows[b][k] in "ab")
        return [r for r in range(first, self.keys) if self.rows[b][r] == "t" or r == self.keys - 1]

    def tokens(self) -> LayerTokens:
        width = max(len(slots) for _, slots in self.images)
        slots = torch.tensor([slots + [-1] * (width - len(slots)) for _, slots in self.images])
        count = torch.tensor([len(slots) for _, slots in self.images])
        row = torch.tensor([b for b, _ in self.images])
        groups = ImageGroups(torch.where(slots < 0, -1, slots - self.past), row, count, torch.zeros_like(count))
        texts = [[r - self.past for r in self.text(b)] for b in range(len(self.rows))]
        longest = max(map(len, texts))
        return LayerTokens(
            groups=groups,
            slots=slots,
            query=self.query,
            key=self.key,
            scaling=SCALING,
            visible=torch.tensor([[letter != "." for letter in row] for row in self.rows]),
            last=torch.full((len(self.rows),), self.keys - self.past - 1),
            text=torch.tensor([text + [-1] * (longest - len(text)) for text in texts]),
        )

    def of_images(self, received: list[list[list[float]]]) -> torch.Tensor:
        """(groups, heads, n), -inf at padding. received: for each sample and head a number a key."""
        width = max(len(slots) for _, slots in self.images)
        return torch.tensor(
            [
                [[per_key[k] for k in slots] + [-math.inf] * (width - len(slots)) for per_key in received[b]]
                for b, slots in self.images
            ]
        )

    def per_kv_head(self, received: list[list[list[float]]]) -> list[list[list[float]]]:
        share = HEADS // KV_HEADS
        return [
            [[sum(head[k] for head in heads[g * share :][:share]) / share for k in range(self.keys)] for g in range(2)]
            for heads in received
        ]

    def total(self, rows, **options) -> list[list[list[float]]]:
        """What every key receives from `rows(sample)`, for each sample and head."""
        received = []
        for b in range(len(self.rows)):
            maps = [[self.attention(b, head, row, **options) for row in rows(b)] for head in range(HEADS)]
            received.append([[sum(row[k] for row in of_head) for k in range(self.keys)] for of_head in maps])
        return received


def close(fast: torch.Tensor, slow: torch.Tensor) -> None:
    torch.testing.assert_close(fast, slow.to(fast.dtype), rtol=1e-4, atol=1e-6)


def ragged(rows: list[list[float]]) -> torch.Tensor:
    """(groups, 1, n), -inf at padding."""
    width = max(map(len, rows))
    return torch.tensor([[row + [-math.inf] * (width - len(row))] for row in rows])


# Visual SnapKV -----------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize(("window", "kernel"), [(1, 1), (4, 3), (32, 5), (6, 1), (3, 9)])
def test_snapkv_pools_the_mean_of_the_last_rows(layout, window, kernel):
    slow = Slow(layout)
    mean = [
        [[value / len(slow.recent(b, window)) for value in head] for head in heads]
        for b, heads in enumerate(slow.per_kv_head(slow.total(lambda b: slow.recent(b, window))))
    ]
    expected = slow.of_images(mean)
    pooled = expected.clone()
    for g, (_, slots) in enumerate(slow.images):
        for h in range(KV_HEADS):
            for i in range(len(slots)):
                near = range(max(0, i - kernel // 2), min(len(slots), i + kernel // 2 + 1))
                pooled[g, h, i] = sum(float(expected[g, h, j]) for j in near) / len(near)
    close(VisualSnapKV(window=window, kernel=kernel).score(slow.tokens()), pooled)


def test_pooling_does_not_lower_the_borders_of_an_image():
    scores = ragged([[1.0] * 7, [1.0] * 2])
    assert torch.equal(pool_neighbours(scores, 5), scores)


# CSP ---------------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
def test_csp_reads_the_last_share_of_each_sample(layout, share):
    slow = Slow(layout)
    rows = window_rows(slow.tokens(), share)
    for b, row in enumerate(slow.rows):
        length = sum(letter != "." for letter in row)
        own = slow.recent(b, max(1, math.floor(share * length + 1e-4)))
        assert [r + slow.past for r in rows[b].tolist() if r >= 0] == own


def test_csp_without_padding_reads_the_same_rows():
    tokens = Slow(LAYOUTS[0]).tokens()
    assert torch.equal(window_rows(tokens, 0.4), window_rows(replace(tokens, visible=None), 0.4))
    close(CSP(window=0.4).score(replace(tokens, visible=None)), CSP(window=0.4).score(tokens))


@layouts
@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_csp_splits_softmax_one_by_the_kind_of_row(layout, share):
    slow = Slow(layout)

    def window(b: int) -> list[int]:
        length = sum(letter != "." for letter in slow.rows[b])
        return slow.recent(b, max(1, math.floor(share * length + 1e-4)))

    def half(text: bool) -> torch.Tensor:
        total = slow.total(lambda b: [r for r in window(b) if (r in slow.text(b)) == text], one_more=1)
        return slow.of_images(slow.per_kv_head(total))

    expected = torch.stack([half(True), half(False)], dim=2)
    close(CSP(window=share).score(slow.tokens()), expected)


@few
@given(st.data())
def test_csp_keeps_exactly_the_budget_and_nothing_twice(data):
    n = data.draw(st.integers(1, 12))
    share = data.draw(st.floats(0, 1))
    budget = data.draw(st.integers(1, n))
    heads = [[data.draw(st.lists(coarse, min_size=n, max_size=n)) for _ in range(2)] for _ in range(2)]
    scores = torch.tensor([heads])
    kept = split_budget(scores[:, :, 0], scores[:, :, 1], torch.tensor([budget]), share)
    assert kept.sum(-1).tolist() == [[budget, budget]]
    for h, (cross, own) in enumerate(heads):
        first = math.floor(budget * share + 1e-4)
        if not any(own):
            first = budget
        if not any(cross):
            first = 0
        picked = slow_topk(cross, first)
        rest = sorted((i for i in range(n) if not picked[i]), key=lambda i: (-own[i], i))[: budget - first]
        assert kept[0, h].tolist() == [picked[i] or i in rest for i in range(n)]


# AirCache ----------------------------------------------------------------------------------------------------


# PLPHP -------------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("rows", [None, 1, 3, 50])
def test_plphp_ranks_by_the_mean_of_its_rows(layout, rows):
    slow = Slow(layout, seed=5)
    ranking = [slow.text(b)[-rows:] if rows else slow.text(b) for b in range(len(slow.rows))]
    total = slow.total(lambda b: ranking[b])
    means = [[[x / len(ranking[b]) for x in head] for head in heads] for b, heads in enumerate(total)]
    close(PLPHP(rows=rows).score(slow.tokens()), slow.of_images(slow.per_kv_head(means)))
    last = PLPHP(rows=1).score(slow.tokens())
    assert rows != 1 or torch.allclose(last, slow.tokens().per_kv_head(slow.tokens().last_attention()))


@pytest.mark.parametrize("method", [PLPHP, AirCache])
@pytest.mark.parametrize("rows", [0, 1.5, True, "all"])
def test_rows_are_none_or_a_number(method, rows):
    with pytest.raises(ValueError, match="rows must be an int >= 1"):
        method(rows=rows)


# AirCache ----------------------------------------------------------------------------------------------------


def slow_elite(slow: Slow, b: int, alpha: float, rows: int | None) -> list[int]:
    text = slow.text(b)[-rows:] if rows else slow.text(b)
    heads = [slow.attention(b, h, slow.keys - 1, keys=text) for h in range(HEADS)]
    weights = {r: sum(head[r] for head in heads) / HEADS for r in text}
    return [r for r in text if weights[r] >= alpha * max(weights.values())]


@layouts
@pytest.mark.parametrize(("alpha", "rows"), [(0.0, None), (0.3, None), (0.9, None), (1.0, None), (0.0, 2), (0.3, 3)])
def test_aircache_judges_by_the_elite_over_image_and_elite_keys(layout, alpha, rows):
    slow = Slow(layout, seed=3)
    tokens = slow.tokens()
    elites = [slow_elite(slow, b, alpha, rows) for b in range(len(slow.rows))]
    found = elite_rows(tokens, alpha, rows)
    assert [[r + slow.past for r in row if r >= 0] for row in found.tolist()] == elites
    received = []
    for b, elite in enumerate(elites):
        keys = elite + [k for g, slots in slow.images if g == b for k in slots]
        heads = [[slow.attention(b, h, r, keys=keys) for r in elite] for h in range(HEADS)]
        received.append([[sum(a[k] for a in head) / len(elite) for k in range(slow.keys)] for head in heads])
    close(AirCache(alpha=alpha, rows=rows).score(tokens), slow.of_images(slow.per_kv_head(received)))


@few
@given(st.data())
def test_strength_and_skewness_are_those_of_a_samples_tokens(data):
    images = data.draw(st.lists(st.lists(coarse, min_size=1, max_size=6), min_size=1, max_size=4))
    of = [data.draw(st.integers(0, 1)) for _ in images]
    groups = groups_of([len(image) for image in images])
    groups = ImageGroups(groups.positions, torch.tensor(of), groups.count, groups.pinned)
    strength, skewness = strength_and_skewness(ragged(images)[:, 0], groups).tolist()
    for g, row in enumerate(of):
        values = [value for image, other in zip(images, of, strict=True) if other == row for value in image]
        mean = sum(values) / len(values)
        second, third = (sum((value - mean) ** p for value in values) / len(values) for p in (2, 3))
        assert strength[g] == pytest.approx(sum(values))
        assert skewness[g] == pytest.approx(third / second**1.5 if second > 1e-9 else 0, abs=1e-6)


@few
@given(st.data())
def test_aircache_layers_share_what_keep_asks_for(data):
    layers = data.draw(st.integers(1, 8))
    share = data.draw(st.floats(0.01, 1.0))
    values = [[data.draw(st.floats(0.01, 5)), data.draw(st.floats(-2, 5))] for _ in range(layers)]
    statistics = torch.tensor(values, dtype=torch.float64).unsqueeze(-1)
    rates = layer_shares(statistics, torch.tensor([share], dtype=torch.float64))[:, 0].tolist()
    assert all(0 < rate <= 1 + 1e-9 for rate in rates)
    assert sum(rates) / layers == pytest.approx(share)
    # The slow form: raise one factor until the mean fits.
    means = [sum(max(v[i], 0) for v in values) / layers for i in (0, 1)]
    weight = [sum(max(v[i], 0) / means[i] if means[i] else 1 for i in (0, 1)) / 2 for v in values]
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(1, middle * w) for w in weight) < share * layers else (low, middle)
    assert rates == pytest.approx([min(1, low * w) for w in weight], rel=1e-5)


def test_aircache_shares_follow_the_formula_where_none_exceeds_one():
    statistics = torch.tensor([[[1.0], [3.0]], [[3.0], [1.0]], [[2.0], [5.0]]])
    expected = [0.2 * (1 / 2 + 3 / 3) / 2, 0.2 * (3 / 2 + 1 / 3) / 2, 0.2 * (2 / 2 + 5 / 3) / 2]
    assert layer_shares(statistics, torch.tensor([0.2]).double())[:, 0].tolist() == pytest.approx(expected)


def test_aircache_layers_that_see_nothing_share_evenly():
    shares = layer_shares(torch.zeros(4, 2, 1), torch.tensor([0.3]).double())
    assert shares.flatten().tolist() == pytest.approx([0.3] * 4)


@pytest.mark.parametrize("keep", [0.25, 16])
def test_aircache_mean_budget_is_keep(keep):
    groups = groups_of([64, 40])
    generator = torch.Generator().manual_seed(0)
    method = AirCache(keep=keep)
    scores = [torch.rand(2, KV_HEADS, 64, generator=generator) ** 4 for _ in range(24)]
    for layer in scores:
        layer[1, :, 40:] = -math.inf
    budgets = method.budgets(torch.stack([method.statistics(layer, groups) for layer in scores]), groups)
    asked = torch.tensor([16.0, 10.0 if keep == 0.25 else 16.0])
    assert ((budgets.float().mean(0) - asked).abs() < 1).all(), "less than the floor of each layer"
    assert len(budgets.unique()) > 2


# Elastic Cache -----------------------------------------------------------------------------------------------


@layouts
def test_elastic_cache_scores_what_all_rows_pay(layout):
    slow = Slow(layout)
    total = slow.total(lambda b: slow.recent(b, slow.keys))
    mean = [[[sum(head[k] for head in heads) / HEADS for k in range(slow.keys)]] for heads in total]
    close(ElasticCache().score(slow.tokens()), slow.of_images(mean))


@few
@given(st.data())
def test_dropped_tokens_join_the_nearest_kept_one(data):
    n = data.draw(st.integers(1, 12))
    counts = [n, data.draw(st.integers(1, n))]
    gaps = [data.draw(st.lists(st.integers(1, 3), min_size=n, max_size=n)) for _ in counts]
    positions = torch.tensor(gaps).cumsum(1)
    positions[1, counts[1] :] = -1
    keep = torch.zeros(2, 1, n, dtype=torch.bool)
    for g, count in enumerate(counts):
        keep[g, 0, data.draw(st.permutations(range(count)))[: data.draw(st.integers(1, count))]] = True
    into = nearest_kept(keep, positions)
    assert int(into.min()) >= 0 and int(into.max()) < n
    for g, count in enumerate(counts):
        kept = [i for i in range(count) if keep[g, 0, i]]
        at = positions[g].tolist()
        for i in range(count):
            assert into[g, 0, i] == min(kept, key=lambda j: (abs(at[j] - at[i]), j))


# ZipVL -------------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("probes", [1, 5, 64])
def test_zipvl_scores_are_sums_and_means_over_the_probes_that_see(layout, probes):
    slow = Slow(layout)
    total = slow.total(lambda b: slow.recent(b, probes))
    mean = [[[sum(head[k] for head in heads) / HEADS for k in range(slow.keys)]] for heads in total]
    seen = [[sum(r >= k for r in slow.recent(b, probes)) for k in range(slow.keys)] for b in range(len(slow.rows))]
    per_probe = [[[heads[0][k] / max(1, seen[b][k]) for k in range(slow.keys)]] for b, heads in enumerate(mean)]
    tokens = slow.tokens()
    assert probes_that_see(tokens, tokens.recent(probes)).tolist() == seen
    close(ZipVL(probes=probes).score(tokens), torch.stack([slow.of_images(mean), slow.of_images(per_probe)], dim=2))


@few
@given(st.lists(st.integers(0, 4).map(float), min_size=1, max_size=12), st.floats(0, 1))
def test_zipvl_needs_the_smallest_number_that_reaches_the_threshold(values, threshold):
    needed = int(tokens_for_mass(torch.tensor([[*values, -math.inf]]), threshold))
    ordered = sorted(values, reverse=True)
    enough = [p for p in range(1, len(values) + 1) if sum(ordered[:p]) >= threshold * sum(values)]
    assert needed == min(enough)


@few
@given(st.data())
def test_zipvl_keeps_what_it_needs_and_never_more_than_keep(data):
    keep, threshold = data.draw(keeps), data.draw(st.floats(0, 1))
    method = ZipVL(keep=keep, threshold=threshold)
    counts = [data.draw(st.integers(1, 10)) for _ in range(2)]
    groups = groups_of(counts, [1, 0])
    mass = ragged([data.draw(st.lists(coarse, min_size=n, max_size=n)) for n in counts])
    per_probe = ragged([data.draw(st.lists(coarse, min_size=n, max_size=n)) for n in counts])
    scores = torch.stack([mass, per_probe], dim=2)
    budget = method.budgets(method.statistics(scores, groups).unsqueeze(0), groups)[0]
    most = floor_budget(method.share(groups), groups)
    assert budget.tolist() == torch.minimum(tokens_for_mass(mass[:, 0], threshold), most).tolist()
    kept = method.select(scores, budget)
    for g, count in enumerate(counts):
        assert 1 <= int(budget[g]) <= count
        assert kept[g, 0, :count].tolist() == slow_topk(per_probe[g, 0, :count].tolist(), int(budget[g]))
        assert not kept[g, 0, count:].any()


# All of them -------------------------------------------------------------------------------------------------

METHODS = [VisualSnapKV, CSP, AirCache, ElasticCache, ZipVL]
every = pytest.mark.parametrize("method", METHODS)


@every
@layouts
@pytest.mark.parametrize("keep", [0.3, 0.8, 2])
def test_every_head_keeps_the_budget_and_no_padding(method, layout, keep):
    tokens = Slow(layout, seed=5).tokens()
    groups, made = tokens.groups, method(keep=keep)
    scores = made.score(tokens)
    statistics = made.statistics(scores, groups).expand(-1, len(groups.count)).unsqueeze(0)
    budgets = made.budgets(statistics, groups)
    assert budgets.shape == (1, len(groups.count))
    kept = made.select(scores, budgets[0])
    assert kept.dtype == torch.bool and kept.shape[1] in (1, KV_HEADS) and kept.shape[-1] == tokens.slots.shape[1]
    assert (kept.sum(-1) == budgets[0].unsqueeze(1)).all()
    assert not (kept & ~groups.present.unsqueeze(1)).any()
    if method is not ZipVL:
        assert torch.equal(budgets[0], floor_budget(made.share(groups), groups))
    assert torch.equal(kept, made.select(made.score(tokens), budgets[0])), "the same every time"


@every
def test_half_precision_neither_overflows_nor_turns_to_nan(method):
    slow = Slow(LAYOUTS[1], dtype=torch.float16)
    slow.query, slow.key = slow.query * 60, slow.key * 60  # their product exceeds float16, the scaled one does not
    assert (slow.query[:, :2] @ slow.key.transpose(-1, -2)).isinf().any()
    scores = method().score(replace(slow.tokens(), scaling=0.01))
    assert not scores.isnan().any() and scores.dtype == torch.float32
    assert (scores.isfinite().sum(-1) == slow.tokens().groups.count.view(-1, *[1] * (scores.ndim - 2))).all()


@every
def test_a_sample_scores_the_same_beside_others(method):
    """Left padding and a longer neighbour change nothing."""
    alone = Slow(("tttaaaaabbbbtt",))
    both = Slow((".....tttaaaaabbbbtt", "taaaaaaaattttbbbbtt"))
    both.query[0, :, 5:], both.key[0, :, 5:] = alone.query[0], alone.key[0]
    one, two = method().score(alone.tokens()), method().score(both.tokens())
    torch.testing.assert_close(two[:2, ..., : one.shape[-1]], one)
    assert (two[:2, ..., one.shape[-1] :] == -math.inf).all()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (VisualSnapKV, dict(window=0), "window must be an int >= 1"),
        (VisualSnapKV, dict(kernel=4), "odd"),
        (CSP, dict(window=0), r"in \(0, 1\]"),
        (CSP, dict(window=1.5), r"in \[0, 1\]"),
        (CSP, dict(cross_share=-0.1), r"cross_share must be a number in \[0, 1\]"),
        (AirCache, dict(alpha=1.1), r"alpha must be a number in \[0, 1\]"),
        (ElasticCache, dict(decode_distance=0), "decode_distance .* must be an int >= 1"),
        (ZipVL, dict(threshold=2), r"threshold must be a number in \[0, 1\]"),
        (ZipVL, dict(probes=2.5), "probes must be an int >= 1"),
    ],
)
def test_bad_options_name_the_allowed_range(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_options_survive_a_round_trip():
    for method in (ElasticCache(decode_distance=None), ElasticCache(decode_distance=7), ZipVL(keep=5, threshold=0.9)):
        assert type(method).from_dict(method.to_dict()) == method
