"""The maths of the methods that drop inside the LLM, against slow, obvious re-implementations."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import slow_topk
from test_maths_cache import HEADS, LAYOUTS, Slow

from foveate.methods import get_method
from foveate.methods.adaptinfer import AdaptInfer, text_attention
from foveate.methods.base import LayerMethod, Method, floor_budget
from foveate.methods.clustering import cluster_means, density_peaks
from foveate.methods.dart import DART, key_norms, least_similar, pivot_quotas
from foveate.methods.gsearch import GSearch
from foveate.methods.psigmoid import PSigmoid
from foveate.methods.pyramiddrop import PyramidDrop
from foveate.methods.schedules import ScheduledMethod
from foveate.methods.sparsevlm import SparseVLM, raters, recycled, text_relevance
from foveate.methods.staged import StagedMethod, geometric_share
from foveate.methods.tokens import ImageGroups, LayerTokens
from foveate.methods.topv import TopV, contribution, landmarks, spread_over, transport_cost

few = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 1 << 30)
keeps = st.one_of(st.floats(0.05, 0.95), st.integers(1, 9))
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda rows: rows[0])
METHODS = [
    PyramidDrop(keep=0.3),
    SparseVLM(keep=0.3),
    SparseVLM(keep=0.6, recycle=0.5),
    SparseVLM(keep=3, recycle=1.0),
    AdaptInfer(keep=0.3),
    DART(keep=0.6),
    DART(keep=4, image_pivots=2, text_pivots=1),
    TopV(keep=0.5),
    TopV(keep=3, recover=0.5, iterations=3),
    GSearch(keep=0.4),
    GSearch(keep=3),
    PSigmoid(keep=0.6, steepness=3, floor=0.2),
    PSigmoid(keep=4, steepness=2),
]
methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}_{method.keep}")


class Layer(Slow):
    """A layer with hidden states; padding of the images stands on the right, or on the left."""

    def __init__(self, layout: tuple[str, ...], seed: int = 0, left: bool = False, width: int = 6) -> None:
        super().__init__(layout, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        shape = (len(layout), self.keys - self.past, width)
        self.entered, self.leaves, self.embedded = (torch.randn(shape, generator=generator) for _ in range(3))
        self.centers = torch.rand(*shape[:2], 2, generator=generator)
        self.on_the_left = left

    def tokens(self, stage: int = 0, dropped: int = 0) -> LayerTokens:
        tokens = super().tokens()
        groups, slots = tokens.groups, tokens.slots
        order = (slots >= 0).int().argsort(dim=1, stable=True) if self.on_the_left else torch.arange(slots.shape[1])
        slots, positions = (x.gather(1, order.expand_as(x)) for x in (slots, groups.positions))
        centers = self.centers[groups.row.unsqueeze(1), positions.clamp(min=0)] * (positions >= 0).unsqueeze(-1)
        groups = replace(groups, positions=positions, centers=centers, dropped=torch.full_like(groups.count, dropped))
        states = dict(entered=self.entered, left=self.leaves, embedded=self.embedded)
        return replace(tokens, groups=groups, slots=slots, **states, stage=stage, depth=32)

    def state(self, states: torch.Tensor, b: int, key: int) -> list[float]:
        return states[b, key - self.past].double().tolist()

    def chosen(self, mask: torch.Tensor, tokens: LayerTokens) -> list[list[int]]:
        """The keys of each image that a choice keeps; nothing that is padding is among them."""
        assert not (mask & ~tokens.groups.present).any()
        return [slots[keep].tolist() for slots, keep in zip(tokens.slots, mask, strict=True)]

    def best(self, scores: list[list[float]], budgets: list[int]) -> list[list[int]]:
        """The keys of the `budgets` best scores of each image."""
        kept = []
        for (_, slots), values, budget in zip(self.images, scores, budgets, strict=True):
            kept.append([slot for slot, stays in zip(slots, slow_topk(values, budget), strict=True) if stays])
        return kept


def budget_of(method: LayerMethod, tokens: LayerTokens) -> torch.Tensor:
    if isinstance(method, (StagedMethod, ScheduledMethod)):
        return method.stage_budget(tokens)
    return floor_budget(method.share(tokens.groups), tokens.groups)


def slow_budget(keep: float | int, total: int, stage: int = 0, stages: int = 1) -> int:
    share = min(1.0, keep / total) if isinstance(keep, int) else keep
    return max(1, math.floor(share ** ((stage + 1) / stages) * total + 1e-4))


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(dot(vector, vector))
    return [value / length for value in vector]


def groups_with(total: int, dropped: int, pinned: int = 0) -> ImageGroups:
    count = torch.tensor([total - dropped - pinned])
    return ImageGroups(
        torch.arange(int(count)).unsqueeze(0), torch.tensor([0]), count, torch.tensor([pinned]), torch.tensor([dropped])
    )


# All of them -------------------------------------------------------------------------------------------------


@methods
@layouts
@pytest.mark.parametrize("left", [False, True])
def test_budgets_are_met_exactly_and_padding_has_no_say(method, layout, left):
    layer = Layer(layout, left=left)
    tokens = layer.tokens()
    budget = budget_of(method, tokens)
    chosen = method.select(tokens)
    assert chosen.sum(-1).tolist() == budget.tolist()
    assert torch.equal(chosen, method.select(tokens)), "deterministic"
    assert layer.chosen(chosen, tokens) == Layer(layout, left=not left).chosen(
        method.select(Layer(layout, left=not left).tokens()), Layer(layout, left=not left).tokens()
    )


@methods
def test_a_sample_keeps_the_same_tokens_alone_and_beside_others(method):
    """Two rows of one layout are two samples; each image of a sample is chosen by itself."""
    layer = Layer(LAYOUTS[1])
    tokens = layer.tokens()
    chosen = method.select(tokens)
    groups = tokens.groups
    for b in range(2):
        mine = groups.row == b
        alone = replace(
            tokens,
            groups=ImageGroups(
                groups.positions[mine],
                torch.zeros_like(groups.row[mine]),
                groups.count[mine],
                groups.pinned[mine],
                groups.dropped[mine],
                groups.centers[mine],
            ),
            slots=tokens.slots[mine],
            **{
                name: getattr(tokens, name)[b : b + 1]
                for name in ("query", "key", "visible", "last", "text", "entered", "left", "embedded")
            },
        )
        assert torch.equal(method.select(alone), chosen[mine])


@methods
def test_half_precision_of_huge_states_does_not_overflow(method):
    layer = Layer(LAYOUTS[1])
    tokens = layer.tokens()
    huge = {
        name: (getattr(tokens, name) * scale).half()
        for name, scale in dict(query=60, key=60, entered=1e4, left=1e4, embedded=1e4).items()
    }
    tokens = replace(tokens, **huge)
    chosen = method.select(tokens)
    budget = budget_of(method, tokens)
    assert chosen.sum(-1).tolist() == budget.tolist()
    states = method.merge(tokens, chosen)
    assert states is None or (states.dtype == torch.half and states.isfinite().all())


@methods
def test_nothing_waits_for_the_device(method):
    """Meta tensors hold no numbers, so that whatever asks for one fails."""
    tokens = Layer(LAYOUTS[1]).tokens()
    parts = (getattr(tokens.groups, name) for name in ImageGroups.__dataclass_fields__)
    groups = ImageGroups(*(None if part is None else part.to("meta") for part in parts))
    names = ("slots", "query", "key", "visible", "last", "text", "entered", "left", "embedded")
    tokens = replace(tokens, groups=groups, **{name: getattr(tokens, name).to("meta") for name in names})
    chosen = method.select(tokens)
    assert chosen.is_meta and chosen.dtype == torch.bool
    method.merge(tokens, chosen)


@methods
def test_methods_survive_json(method):
    again = Method.from_dict(json.loads(json.dumps(method.to_dict())))
    assert again == method and type(again) is type(method)


def test_layers_and_schedules_survive_json():
    method = SparseVLM(keep=17, earlier=(66, 30), layers=(3, 7, 16))
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("pyramiddrop", dict(layers=()), "layers"),
        ("pyramiddrop", dict(layers=(3, 3)), "ascending"),
        ("pyramiddrop", dict(layers=(0, 3)), ">= 1"),
        ("pyramiddrop", dict(layers=3), "tuple"),
        ("pyramiddrop", dict(earlier=(0.5, 1.5)), "keep"),
        ("pyramiddrop", dict(earlier=(300, 200)), "one kind"),
        ("sparsevlm", dict(keep=100, earlier=(300, 50)), "descending"),
        ("sparsevlm", dict(recycle=1.5), "recycle"),
        ("sparsevlm", dict(recycle=-0.1), "recycle"),
        ("dart", dict(layer=0), "layer"),
        ("dart", dict(image_pivots=-1), "image_pivots"),
        ("dart", dict(image_pivots=0, text_pivots=0), ">= 1"),
        ("topv", dict(recover=2), "recover"),
        ("topv", dict(gamma=-1), "gamma"),
        ("topv", dict(epsilon=0), "epsilon"),
        ("topv", dict(iterations=0), "iterations"),
    ],
)
def test_bad_options_name_the_allowed_range(name, options, says):
    with pytest.raises(ValueError, match=says):
        get_method(name, **options)


# Stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "layers", "budgets"),
    [
        (PyramidDrop(), (8, 16, 24), (288, 144, 72)),
        (PyramidDrop(keep=9), (8, 16, 24), (144, 36, 9)),
        (PyramidDrop(keep=0.25, layers=(5, 9)), (5, 9), (288, 144)),
        (SparseVLM(keep=110, earlier=(300, 200)), (3, 7, 16), (300, 200, 110)),
        (SparseVLM(keep=1000), (3, 7, 16), (576, 576, 576)),
    ],
)
def test_each_stage_leaves_its_share_of_the_whole_image(method, layers, budgets):
    assert method.stages(32) == layers
    left = 576
    for stage, budget in enumerate(budgets):
        tokens = replace(Layer(("atta",)).tokens(), groups=groups_with(576, 576 - left), stage=stage)
        assert method.stage_budget(tokens).tolist() == [budget]
        left = budget


@few
@given(keeps, st.integers(2, 3000), st.integers(1, 5), st.integers(0, 5))
def test_stages_shrink_alike_and_end_at_keep(keep, total, stages, pinned):
    pinned = min(pinned, total - 1)
    method = PyramidDrop(keep=keep, layers=tuple(range(1, stages + 1)))
    dropped, left = 0, []
    for stage in range(stages):
        groups = groups_with(total, dropped, pinned)
        tokens = replace(Layer(("atta",)).tokens(), groups=groups, stage=stage)
        budget = int(method.stage_budget(tokens))
        slow = min(max(slow_budget(keep, total, stage, stages) - pinned, 1), int(groups.count))
        assert abs(budget - slow) <= 1 and 1 <= budget <= int(groups.count)
        left.append(budget)
        dropped = total - pinned - budget
    assert left == sorted(left, reverse=True)
    assert left[-1] == int(floor_budget(method.share(groups), groups))


def test_shallow_models_have_the_stages_that_they_have_room_for():
    assert [PyramidDrop().stages(depth) for depth in (4, 28, 2)] == [(1, 2, 3), (7, 14, 21), (1,)]
    assert [SparseVLM().stages(depth) for depth in (4, 28, 2)] == [(1, 2, 3), (3, 6, 14), (1,)]
    assert torch.allclose(geometric_share(torch.tensor([0.25]), 0, 2), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="2 values"):
        SparseVLM(keep=0.1, earlier=(0.5,)).stages(32)


@layouts
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("keep", [0.3, 2])
def test_pyramiddrop_follows_the_last_token(layout, left, stage, keep):
    layer = Layer(layout, left=left)
    tokens = layer.tokens(stage=stage, dropped=3)
    scores = []
    for b, slots in layer.images:
        maps = [layer.attention(b, head, layer.keys - 1) for head in range(HEADS)]
        scores.append([sum(row[k] for row in maps) / HEADS for k in slots])
    budgets = [min(len(slots), slow_budget(keep, len(slots) + 3, stage, 3)) for _, slots in layer.images]
    assert layer.chosen(PyramidDrop(keep=keep).select(tokens), tokens) == layer.best(scores, budgets)


# SparseVLM ---------------------------------------------------------------------------------------------------


def slow_relevance(layer: Layer, b: int) -> dict[int, float]:
    total: dict[int, float] = dict.fromkeys(layer.text(b), 0.0)
    images = [k for sample, slots in layer.images for k in slots if sample == b]
    for v in images:
        logits = {t: dot(layer.state(layer.embedded, b, v), layer.state(layer.embedded, b, t)) for t in total}
        norm = sum(map(math.exp, logits.values()))
        for t in total:
            total[t] += math.exp(logits[t]) / norm / len(images)
    return total


def slow_raters(layer: Layer, b: int) -> list[int]:
    relevance = slow_relevance(layer, b)
    mean = sum(relevance.values()) / len(relevance)
    return [t for t, value in relevance.items() if value > mean]


@layouts
@pytest.mark.parametrize("chunk", [1, 40, 1 << 24])
@pytest.mark.parametrize("left", [False, True])
def test_relevant_text_is_what_the_image_points_at(layout, chunk, left):
    layer = Layer(layout, left=left)
    tokens = layer.tokens()
    groups, real = tokens.groups, tokens.text >= 0
    images, text = tokens.image_rows(layer.embedded), tokens.text_rows(layer.embedded)
    fast = text_relevance(images, groups.present, groups.row, text, real, chunk)
    chosen = raters(fast, real)
    for b in range(len(layout)):
        slow = slow_relevance(layer, b)
        torch.testing.assert_close(fast[b, : len(slow)], torch.tensor(list(slow.values())), rtol=1e-4, atol=1e-6)
        assert not fast[b, len(slow) :].any()
        assert [t for t, yes in zip(slow, chosen[b].tolist(), strict=False) if yes] == slow_raters(layer, b)


@layouts
@pytest.mark.parametrize("seed", range(4))
def test_sparsevlm_follows_its_raters(layout, seed):
    layer = Layer(layout, seed)
    tokens = layer.tokens()
    scores = []
    for b, slots in layer.images:
        who = slow_raters(layer, b)
        if all(t < min(slots) for t in who):
            who = [layer.keys - 1]
        scores.append(
            [sum(layer.attention(b, h, t)[k] for h in range(HEADS) for t in who) / HEADS / len(who) for k in slots]
        )
    method = SparseVLM(keep=0.4, layers=(1,))
    budgets = [slow_budget(0.4, len(slots)) for _, slots in layer.images]
    assert layer.chosen(method.select(tokens), tokens) == layer.best(scores, budgets)


def slow_adaptinfer(layer: Layer, b: int, slots: list[int]) -> list[float]:
    text, total = layer.text(b), dict.fromkeys(slots, 0.0)
    for h in range(HEADS):
        maps = {t: layer.attention(b, h, t) for t in text}
        for t in text:
            prior = sum(maps[other][t] + maps[t][other] for other in text) - maps[t][t]
            for k in slots:
                total[k] += prior * maps[t][k]
    return list(total.values())


@layouts
@pytest.mark.parametrize("seed", range(4))
def test_adaptinfer_weighs_text_by_what_other_text_has_to_do_with_it(layout, seed):
    layer = Layer(layout, seed)
    tokens, method = layer.tokens(), AdaptInfer(keep=0.4, layers=(1,))
    scores = [slow_adaptinfer(layer, b, slots) for b, slots in layer.images]
    fast = method.score(tokens)
    for values, row, present in zip(scores, fast, tokens.groups.present, strict=True):
        torch.testing.assert_close(row[present], torch.tensor(values), rtol=1e-4, atol=1e-6)
    budgets = [slow_budget(0.4, len(slots)) for _, slots in layer.images]
    assert layer.chosen(method.select(tokens), tokens) == layer.best(scores, budgets)


@layouts
def test_text_attention_is_the_same_a_row_at_a_time(layout):
    tokens = Layer(layout).tokens()
    rows = torch.cat([each for _, each in text_attention(tokens, 1)], 2)
    torch.testing.assert_close(rows, tokens.attention(tokens.text))


def test_the_last_token_rates_where_no_rater_sees_the_image():
    """The only relevant text stands between two images: it has never seen the second."""
    layer = Layer(("aaaatbbbbt",))
    layer.embedded[0, 4], layer.embedded[0, 9] = 1.0, -1.0
    layer.embedded[0, :4], layer.embedded[0, 5:9] = 1.0, 1.0
    tokens = layer.tokens()
    assert slow_raters(layer, 0) == [4]
    chosen = layer.chosen(SparseVLM(keep=2, layers=(1,)).select(tokens), tokens)
    scores = []
    for (b, slots), who in zip(layer.images, (4, 9), strict=True):
        scores.append([sum(layer.attention(b, h, who)[k] for h in range(HEADS)) for k in slots])
    assert chosen == layer.best(scores, [2, 2])


def slow_density_peaks(distance: list[list[float]], k: int) -> tuple[list[int], list[int]]:
    n = len(distance)
    density = [-sum(d * d for d in sorted(row)[:k]) / k for row in distance]
    largest = max(max(row) for row in distance)
    score = []
    for i in range(n):
        denser = [j for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        separation = min([distance[i][j] for j in denser] + [largest])
        score.append(density[i] + math.log(max(separation, torch.finfo(torch.float32).tiny)))
    centers = sorted(range(n), key=lambda i: (-score[i], i))[:k]
    member = []
    for i in range(n):
        nearest = min(range(k), key=lambda c: (distance[i][centers[c]], c))
        member.append(centers.index(i) if i in centers else nearest)
    return centers, member


@few
@given(st.data(), seeds)
def test_density_peaks(data, seed):
    sizes = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=3))
    clusters = [data.draw(st.integers(1, size)) for size in sizes]
    n, most = max(sizes) + data.draw(st.integers(0, 2)), max(clusters)
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(0, 4, (len(sizes), n, 2), generator=generator).float()
    distance = (points.unsqueeze(1) - points.unsqueeze(2)).abs().sum(-1)  # whole numbers: many ties
    valid = torch.arange(n) < torch.tensor(sizes).unsqueeze(-1)
    centers, real, member = density_peaks(distance, valid, torch.tensor(clusters), most)
    means = cluster_means(points, member, valid, most)
    for s, (size, k) in enumerate(zip(sizes, clusters, strict=True)):
        slow_centers, slow_member = slow_density_peaks(distance[s, :size, :size].tolist(), k)
        assert centers[s][real[s]].tolist() == slow_centers
        assert member[s, :size].tolist() == slow_member
        for c in range(k):
            mine = [points[s, i] for i in range(size) if slow_member[i] == c]
            torch.testing.assert_close(means[s, c], torch.stack(mine).mean(0))


@few
@given(st.data(), st.floats(0.0, 1.0), seeds)
def test_recycling_spends_the_budget_on_means_too(data, recycle, seed):
    counts = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    budgets = [data.draw(st.integers(1, count)) for count in counts]
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (len(counts), max(counts)), generator=generator).float()
    states = torch.randn(*scores.shape, 3, generator=generator)
    for g, count in enumerate(counts):
        scores[g, count:] = -math.inf
    kept, centers, real, means = recycled(scores, states, torch.tensor(budgets), torch.tensor(counts), recycle)
    for g, (count, budget) in enumerate(zip(counts, budgets, strict=True)):
        gone = count - budget
        size = math.floor(recycle * gone + 1e-6) + 1
        clusters = min(size // 10 + 1, budget - 1) if gone else 0
        order = sorted(range(count), key=lambda i: (-scores[g, i].item(), i))
        assert sorted(order[: budget - clusters]) == kept[g].nonzero().flatten().tolist()
        assert int(real[g].sum()) == clusters
        if clusters:
            pool = order[budget - clusters :][:size]
            apart = [[math.dist(states[g, i].tolist(), states[g, j].tolist()) / 3**0.5 for j in pool] for i in pool]
            at, member = slow_density_peaks(apart, clusters)
            assert [pool[i] for i in at] == centers[g][real[g]].tolist()
            for c in range(clusters):
                mine = [states[g, i] for i, m in zip(pool, member, strict=True) if m == c]
                torch.testing.assert_close(means[g, c], torch.stack(mine).mean(0))


def test_sparsevlm_merges_only_into_centres():
    layer = Layer(("t" + "a" * 40 + "ttt", "." * 9 + "a" * 33 + "tt"))
    tokens = layer.tokens()
    method = SparseVLM(keep=0.3, recycle=0.5, layers=(1,))
    chosen = method.select(tokens)
    merged, own = method.merge(tokens, chosen), tokens.image_rows(layer.leaves)
    kept, centers, real, means = recycled(
        method.score(tokens), own, method.stage_budget(tokens), tokens.groups.count, 0.5
    )
    for g in range(2):
        places = centers[g][real[g]].tolist()
        assert len(places) == 2 and chosen[g][places].all() and not kept[g][places].any()
        torch.testing.assert_close(merged[g, places], means[g][real[g]])
        rest = [i for i in range(own.shape[1]) if i not in places]
        assert torch.equal(merged[g, rest], own[g, rest])
    assert SparseVLM().merge(tokens, chosen) is None


# DART --------------------------------------------------------------------------------------------------------


@few
@given(st.data())
def test_pivots_share_what_is_left(data):
    valid = data.draw(st.lists(st.booleans(), min_size=1, max_size=8))
    rest = data.draw(st.integers(0, 40))
    quotas = pivot_quotas(torch.tensor([valid]), torch.tensor([rest]))[0].tolist()
    some = sum(valid)
    slow = iter([rest // some + (i < rest % some) for i in range(some)] if some else [])
    assert quotas == [next(slow) if yes else 0 for yes in valid]


@few
@given(st.data(), seeds)
def test_each_pivot_takes_the_least_similar_of_what_is_left(data, seed):
    n, pivots = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randint(-2, 3, (1, pivots, n), generator=generator).float()
    present = torch.rand(1, n, generator=generator) < 0.9
    start = (torch.rand(1, n, generator=generator) < 0.2) & present
    quotas = [data.draw(st.integers(0, 5)) for _ in range(pivots)]
    kept = start[0].nonzero().flatten().tolist()
    for pivot, quota in enumerate(quotas):
        free = [i for i in range(n) if present[0, i] and i not in kept]
        kept += sorted(free, key=lambda i: (similarity[0, pivot, i].item(), i))[:quota]
    fast = least_similar(similarity, start, present, torch.tensor([quotas]))
    assert fast[0].nonzero().flatten().tolist() == sorted(kept)


@layouts
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("options", [dict(keep=0.7), dict(keep=5, image_pivots=2), dict(keep=0.5, text_pivots=0)])
def test_dart_keeps_pivots_and_what_differs_from_them(layout, left, options):
    layer, method = Layer(layout, seed=3, left=left), DART(**options)
    scale = torch.rand(layer.leaves.shape[-1], generator=torch.Generator().manual_seed(1)) + 0.5
    tokens = replace(layer.tokens(), norm=lambda states: states * scale.to(states.dtype))
    layer.leaves = layer.leaves * scale  # as the final norm leaves them, but for their length
    norm = key_norms(layer.key).tolist()
    kept = []
    for b, slots in layer.images:
        budget = min(len(slots), slow_budget(method.keep, len(slots)))
        of_image = sorted(slots, key=lambda k: (-norm[b][k], k))[: min(method.image_pivots, budget)]
        of_text = sorted(layer.text(b), key=lambda k: (-norm[b][k], k))[: method.text_pivots]
        pivots = of_image + of_text
        mine = list(of_image)
        for i, pivot in enumerate(pivots):
            rest = budget - len(of_image)
            quota = rest // len(pivots) + (i < rest % len(pivots))
            like = {
                k: dot(unit(layer.state(layer.leaves, b, pivot)), unit(layer.state(layer.leaves, b, k)))
                for k in slots
                if k not in mine
            }
            mine += sorted(like, key=lambda k: (like[k], k))[:quota]
        assert len(mine) == budget
        kept.append(sorted(mine))
    assert layer.chosen(method.select(tokens), tokens) == kept


def test_padding_of_shorter_texts_takes_no_pivots_place():
    """The first row, to which padding would point, has the largest key of all."""
    layer = Layer(("taaaaaatttttt", "taaaaaaaaaaat"))
    layer.key[:, :, 0] = 100.0
    tokens, method = layer.tokens(), DART(keep=0.5, image_pivots=0, text_pivots=1)
    (b, slots), pivot = layer.images[1], layer.keys - 1
    like = [-dot(unit(layer.state(layer.leaves, b, pivot)), unit(layer.state(layer.leaves, b, k))) for k in slots]
    best = [k for k, yes in zip(slots, slow_topk(like, len(slots) // 2), strict=True) if yes]
    assert layer.chosen(method.select(tokens), tokens)[1] == best


def test_key_norms_count_all_heads():
    keys = torch.randn(2, 3, 4, 5)
    slow = [[sum(abs(keys[b, h, i, d].item()) for h in range(3) for d in range(5)) for i in range(4)] for b in range(2)]
    torch.testing.assert_close(key_norms(keys), torch.tensor(slow))


# TopV --------------------------------------------------------------------------------------------------------


@few
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 12))
def test_landmarks_are_all_tokens_or_an_even_stride(present, limit):
    index, valid = landmarks(torch.tensor([present]), limit)
    real = [i for i, yes in enumerate(present) if yes]
    chosen = index[0][valid[0]].tolist()
    assert len(chosen) == min(len(real), limit) and chosen == sorted(set(chosen)) and set(chosen) <= set(real)
    if len(real) <= limit:
        assert chosen == real
    else:
        gaps = [real.index(b) - real.index(a) for a, b in pairwise(chosen)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def slow_cost(source, target, here, there, weights, sigma) -> float:
    feature = math.dist(unit(source), unit(target)) / 2
    spatial = 1 - math.exp(-(math.dist(here, there) ** 2) / (2 * sigma**2))
    central = math.dist(here, (0.5, 0.5)) / math.dist((0, 0), (0.5, 0.5))
    return weights[0] * feature + weights[1] * spatial + weights[2] * central


def slow_contribution(cost: list[list[float]], epsilon: float, iterations: int) -> list[float]:
    """Row sums of the plan between equal masses, with plain numbers."""
    n, m = len(cost), len(cost[0])
    kernel = [[math.exp(-c / epsilon) for c in row] for row in cost]
    u, v = [1.0] * n, [1.0] * m
    for iteration in range(iterations):
        if iteration:
            u = [1 / n / sum(kernel[i][j] * v[j] for j in range(m)) for i in range(n)]
        v = [1 / m / sum(kernel[i][j] * u[i] for i in range(n)) for j in range(m)]
    return [u[i] * sum(kernel[i][j] * v[j] for j in range(m)) for i in range(n)]


@few
@given(st.data(), st.integers(1, 4), seeds)
def test_contributions_are_the_row_sums_of_the_plan(data, iterations, seed):
    n, m = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    extra = data.draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(1, n + extra, m + extra, generator=generator)
    present, valid = (torch.arange(k + extra).unsqueeze(0) < k for k in (n, m))
    fast = contribution(cost, present, valid, 0.2, iterations)[0]
    slow = slow_contribution(cost[0, :n, :m].tolist(), 0.2, iterations)
    torch.testing.assert_close(fast[:n].softmax(-1), torch.tensor(slow), rtol=1e-4, atol=1e-6)
    assert (fast[n:] == -math.inf).all()


def test_prescribed_sources_rank_nothing():
    """Why the plan ends with the targets, and why more iterations are no better: at the end all sources give alike."""
    cost = torch.rand(1, 30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(1, 30, dtype=torch.bool)
    spread = [contribution(cost, everything, everything, 0.2, k)[0].std().item() for k in (1, 2, 3, 50)]
    assert spread == sorted(spread, reverse=True) and spread[0] > 0.05 and spread[-1] < 1e-9
    # With the first step alone, what the cost knows of a source counts in full.
    off_center = cost + torch.linspace(0, 1, 30)[:, None]
    once = contribution(off_center, everything, everything, 0.2, 1)[0]
    assert once.argsort()[-5:].max() < 15


@few
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.data())
def test_recovery_is_even(candidates, data):
    real = [i for i, yes in enumerate(candidates) if yes]
    budget = data.draw(st.integers(0, len(real)))
    chosen = spread_over(torch.tensor([candidates]), torch.tensor([budget]))[0].nonzero().flatten().tolist()
    assert len(chosen) == budget and set(chosen) <= set(real)
    gaps = [real.index(b) - real.index(a) for a, b in pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@layouts
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("options", [dict(keep=0.5), dict(keep=4, recover=0.5, gamma=1.0, iterations=3)])
def test_topv_keeps_what_contributes_and_an_even_rest(layout, left, options):
    layer, method = Layer(layout, seed=5, left=left), TopV(**options)
    tokens = layer.tokens()
    weights = (method.alpha, method.beta, method.gamma)
    kept = []
    for b, slots in layer.images:
        source, target = ([layer.state(states, b, k) for k in slots] for states in (layer.entered, layer.leaves))
        at = [layer.centers[b, k - layer.past].tolist() for k in slots]
        cost = [
            [slow_cost(s, t, here, there, weights, method.sigma) for t, there in zip(target, at, strict=True)]
            for s, here in zip(source, at, strict=True)
        ]
        budget = min(len(slots), slow_budget(method.keep, len(slots)))
        recovered = math.floor(method.recover * budget)
        best = slow_topk(slow_contribution(cost, method.epsilon, method.iterations), budget - recovered)
        rest = [k for k, yes in zip(slots, best, strict=True) if not yes]
        mine = [k for k, yes in zip(slots, best, strict=True) if yes]
        for q in range(len(rest)):  # the strides end where a multiple of 1 / recovered is passed, half a stride early
            if (((q + 1) * recovered + len(rest) // 2) // len(rest)) > ((q * recovered + len(rest) // 2) // len(rest)):
                mine.append(rest[q])
        kept.append(sorted(mine))
    assert layer.chosen(method.select(tokens), tokens) == kept


def test_cost_terms_lie_between_nothing_and_their_weight():
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 9, 4, generator=generator), torch.randn(2, 7, 4, generator=generator)
    at = torch.rand(2, 9, 2, generator=generator)
    for i in range(3):
        weights = tuple(float(i == j) for j in range(3))
        cost = transport_cost(source, target, at, at[:, :7], weights, 0.4)
        assert (cost >= 0).all() and (cost <= 1).all()
        for s in range(9):
            for t in range(7):
                here, there = at[0, s].tolist(), at[0, t].tolist()
                slow = slow_cost(source[0, s].tolist(), target[0, t].tolist(), here, there, weights, 0.4)
                assert math.isclose(cost[0, s, t], slow, abs_tol=1e-5)
