"""The maths of methods in front of the LLM against slow, obvious re-implementations, ties and edges included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import slow_topk

from foveate.methods.base import token_budget
from foveate.methods.divprune import DivPrune, farthest_first
from foveate.methods.greedy import first_of
from foveate.methods.pooling import Pooling, bands, cells, mean_of_equals, spread
from foveate.methods.tokens import EncoderTokens
from foveate.methods.visionzip import VisionZip, contextual_states, dominant_and_targets
from foveate.methods.vtc_cls import VTCCLS, ensembled_attention

few = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 1 << 30)
sides = st.integers(1, 7)
keeps = st.one_of(st.floats(0.01, 1.0), st.integers(1, 40))
HIDDEN, WIDTH, DIM, LAYERS = 6, 5, 4, 3
METHODS = [VTCCLS(), VisionZip(), VisionZip(contextual=0.0), VisionZip(contextual=1.0), DivPrune(), Pooling()]
DEVICE = torch.device("cpu")


def signs(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Vectors of 4 signs: their norm is 2 and all their cosines are exact, with many ties and duplicates."""
    return torch.randint(0, 2, (*shape, 4), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


def tokens_of(grid: tuple[int, int], tiles: int, seed: int = 0, dtype=torch.float32, **known) -> EncoderTokens:
    """Tiles with everything that a method may read; attention is coarse, so that ties are common."""
    rng, n = torch.Generator().manual_seed(seed), grid[0] * grid[1]
    weight = torch.randn(WIDTH, HIDDEN, generator=rng).to(dtype)
    states = torch.randn(tiles, n, WIDTH, generator=rng).to(dtype)
    return EncoderTokens(
        grid,
        tiles,
        DEVICE,
        received=torch.rand(tiles, LAYERS, n, generator=rng),
        given=torch.rand(tiles, LAYERS, n, generator=rng),
        cls=torch.randint(0, 4, (tiles, LAYERS, n), generator=rng).float(),
        keys=torch.randn(tiles, n, DIM, generator=rng).to(dtype),
        features=states @ weight,
        states=states,
        project=lambda x: x @ weight,
        **known,
    )


# What holds for all of them ----------------------------------------------------------------------------------


@few
@given(st.sampled_from(METHODS), sides, sides, st.lists(keeps, min_size=1, max_size=3), seeds)
def test_every_tile_keeps_exactly_its_budget(method, rows, columns, keep, seed):
    budgets = [token_budget(k, rows * columns) for k in keep]
    tokens = tokens_of((rows, columns), len(keep), seed, most=max(budgets))
    chosen = method.select(tokens, torch.tensor(budgets))
    assert chosen.dtype == torch.bool and chosen.shape == (len(keep), rows * columns)
    assert chosen.sum(-1).tolist() == budgets
    merged = method.merge(tokens, chosen)
    assert merged is None or (merged.shape == tokens.features.shape and merged.dtype == tokens.features.dtype)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_tile_is_treated_the_same_in_any_company(method):
    """Alone, beside tiles of other budgets, and where the largest budget is not known outside the device."""
    budget = torch.tensor([3, 11, 20])
    tokens = tokens_of((4, 5), 3, seed=1, most=20)
    together = method.select(tokens, budget)
    merged = method.merge(tokens, together)
    for t in range(3):
        parts = {
            name: getattr(tokens, name)[t : t + 1]
            for name in ("received", "given", "cls", "keys", "features", "states")
        }
        for most in (None, int(budget[t])):
            alone = EncoderTokens((4, 5), 1, DEVICE, **parts, project=tokens.project, most=most)
            chosen = method.select(alone, budget[t : t + 1])
            assert torch.equal(chosen[0], together[t])
            if merged is not None:
                of_one = method.merge(alone, chosen)
                torch.testing.assert_close(of_one[0][chosen[0]], merged[t][chosen[0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_half_precision_neither_overflows_nor_loses_tokens(method, dtype):
    tokens = tokens_of((4, 5), 2, seed=2, dtype=dtype)
    large = EncoderTokens(
        tokens.grid,
        tokens.tiles,
        DEVICE,
        cls=tokens.cls,
        keys=tokens.keys * 1000,
        features=tokens.features * 1000,
        states=tokens.states * 1000,
        project=tokens.project,
    )
    chosen = method.select(large, torch.tensor([7, 13]))
    assert chosen.sum(-1).tolist() == [7, 13]
    merged = method.merge(large, chosen)
    assert merged is None or (merged.isfinite().all() and merged.dtype == dtype)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_device_is_asked_nothing(method):
    """On the meta device every question that waits for an answer fails."""
    meta = {
        name: value.to("meta")
        for name, value in vars(tokens_of((4, 5), 2)).items()
        if isinstance(value, torch.Tensor) and name in method.reads
    }
    weight = torch.empty(WIDTH, HIDDEN, device="meta")
    tokens = EncoderTokens((4, 5), 2, torch.device("meta"), **meta, project=lambda x: x @ weight)
    chosen = method.select(tokens, torch.tensor([7, 13], device="meta"))
    method.merge(tokens, chosen)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VTCCLS(layers=0), "layers must be an int >= 1"),
        (lambda: VTCCLS(layers=1.5), "layers must be an int >= 1"),
        (lambda: VisionZip(contextual=1.1), r"contextual must be a number in \[0, 1\]"),
        (lambda: VisionZip(contextual=-0.1), r"contextual must be a number in \[0, 1\]"),
        (lambda: VisionZip(keep=0.0), "keep must be"),
        (lambda: DivPrune(keep=0), "keep must be"),
        (lambda: Pooling(keep=1.5), "keep must be"),
    ],
)
def test_bad_options_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# VTC-CLS -----------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 12), seeds)
def test_vtc_cls_sums_what_the_layers_say(n, layers, budget, seed):
    cls = torch.randint(0, 3, (2, layers, n), generator=torch.Generator().manual_seed(seed)).float()
    tokens = EncoderTokens((1, n), 2, DEVICE, cls=cls)
    chosen = VTCCLS(layers=layers).select(tokens, torch.tensor([min(budget, n)] * 2))
    for tile in range(2):
        total = [sum(cls[tile, layer, i].item() for layer in range(layers)) for i in range(n)]
        assert chosen[tile].tolist() == slow_topk(total, min(budget, n))
    assert ensembled_attention(cls.half()).dtype == torch.float32


def test_vtc_cls_reads_as_many_layers_as_vote():
    assert VTCCLS().vision_layers == 3 and VTCCLS(layers=7).vision_layers == 7
    assert VisionZip().vision_layers == 1, "VisionZip looks at the penultimate layer alone"


# VisionZip ---------------------------------------------------------------------------------------------------


def slow_visionzip(scores, states, keys, budget: int, share: float):
    """Dominant tokens, targets, and the targets' new states, token by token."""
    n = len(scores)
    count = math.floor(share * budget + 1e-9)
    dominant = [i for i, kept in enumerate(slow_topk(scores, budget - count)) if kept]
    rest = [i for i in range(n) if i not in dominant]
    targets = rest[:: max(1, len(rest) // count)][:count] if count else []
    joined: dict[int, list[int]] = {t: [] for t in targets}
    unit = [[x / math.sqrt(sum(y * y for y in key)) for x in key] for key in keys.double().tolist()]
    for i in (i for i in rest if i not in targets and targets):
        alike = {t: sum(a * b for a, b in zip(unit[i], unit[t], strict=True)) for t in targets}
        joined[max(targets, key=lambda t: (alike[t], -t))].append(i)
    new = {}
    for t, members in joined.items():
        new[t] = states[t].double()
        if members:
            new[t] = new[t] + sum(states[i].double() for i in members) / len(members)
    return dominant, targets, new


@few
@given(st.integers(1, 20), keeps, st.sampled_from([0.0, 10 / 64, 0.3, 0.5, 1.0]), st.booleans(), seeds)
def test_visionzip_splits_assigns_and_merges(n, keep, share, coarse, seed):
    rng = torch.Generator().manual_seed(seed)
    budget = token_budget(keep, n)
    keys = signs((2, n), seed) if coarse else torch.randn(2, n, DIM, generator=rng)
    scores, states = torch.randint(0, 3, (2, n), generator=rng).float(), torch.randn(2, n, WIDTH, generator=rng)
    dominant, target = dominant_and_targets(scores, torch.tensor([budget] * 2), share)
    for chunk in (1, 64, 1 << 24):
        merged = contextual_states(states, keys, dominant, target, max(1, int(share * n)), chunk)
        for tile in range(2):
            best, targets, new = slow_visionzip(scores[tile].tolist(), states[tile], keys[tile], budget, share)
            assert dominant[tile].nonzero().flatten().tolist() == best
            assert target[tile].nonzero().flatten().tolist() == targets
            for slot, t in enumerate(targets):
                torch.testing.assert_close(merged[tile, slot].double(), new[t], rtol=1e-5, atol=1e-5)


def test_visionzip_splits_the_papers_budgets_as_the_paper_does():
    scores = torch.rand(3, 576, generator=torch.Generator().manual_seed(0))
    dominant, target = dominant_and_targets(scores, torch.tensor([64, 128, 192]), VisionZip().contextual)
    assert dominant.sum(-1).tolist() == [54, 108, 162] and target.sum(-1).tolist() == [10, 20, 30]


def test_visionzip_merges_in_front_of_the_projector_and_leaves_the_dominant_alone():
    grid, budget = (4, 5), 8
    tokens = tokens_of(grid, 2, seed=3)
    bent = EncoderTokens(
        grid, 2, DEVICE, cls=tokens.cls, keys=tokens.keys, states=tokens.states, features=tokens.states.tanh()[..., :3]
    )
    bent = EncoderTokens(**{**vars(bent), "project": lambda x: x.tanh()[..., :3]})
    method = VisionZip(contextual=0.5)
    merged = method.merge(bent, method.select(bent, torch.tensor([budget] * 2)))
    for tile in range(2):
        scores = tokens.cls[tile, -1].tolist()
        best, _, new = slow_visionzip(scores, tokens.states[tile], tokens.keys[tile], budget, 0.5)
        assert torch.equal(merged[tile, best], bent.features[tile, best])
        for t, state in new.items():
            torch.testing.assert_close(merged[tile, t].double(), state.tanh()[:3], rtol=1e-5, atol=1e-5)


# DivPrune ----------------------------------------------------------------------------------------------------


def slow_max_min(features: torch.Tensor, k: int) -> list[int]:
    """Greedy max-min diversity from the whole table of cosine distances, as published."""
    n = len(features)
    unit = features.double() / features.double().norm(dim=-1, keepdim=True)
    distance = [[1 - float(unit[i] @ unit[j]) for j in range(n)] for i in range(n)]
    loneliest = [min((distance[i][j] for j in range(n) if j != i), default=0.0) for i in range(n)]
    picked = [loneliest.index(max(loneliest))]
    while len(picked) < k:
        others = [i for i in range(n) if i not in picked]
        picked.append(max(others, key=lambda i: (min(distance[i][j] for j in picked), -i)))
    return picked


@few
@given(st.integers(1, 16), st.integers(1, 16), st.booleans(), st.sampled_from([1, 40, 300, 1 << 27]), seeds)
def test_divprune_picks_as_the_slow_form(n, k, coarse, limit, seed):
    """Whether the tables of all tiles fit, of one tile, or not even that."""
    rng = torch.Generator().manual_seed(seed)
    features = signs((3, n), seed) if coarse else torch.randn(3, n, HIDDEN, generator=rng)
    order = farthest_first(features, min(k, n), limit)
    assert order.tolist() == [slow_max_min(tile, min(k, n)) for tile in features]


def test_divprune_takes_duplicates_last():
    features = signs((1, 40), 5)
    kinds = len({tuple(row) for row in features[0].tolist()})
    order = farthest_first(features, 40)[0].tolist()
    assert sorted(order) == list(range(40)), "no token twice"
    assert len({tuple(features[0, i].tolist()) for i in order[:kinds]}) == kinds


def test_divprune_budgets_are_prefixes_of_one_order():
    features = torch.randn(2, 30, HIDDEN, generator=torch.Generator().manual_seed(6))
    order = farthest_first(features, 20)
    chosen = first_of(order, torch.tensor([5, 20]), 30)
    assert chosen[0].nonzero().flatten().tolist() == sorted(order[0, :5].tolist())
    assert chosen[1].nonzero().flatten().tolist() == sorted(order[1].tolist())
    tokens = EncoderTokens((5, 6), 2, DEVICE, features=features, most=20)
    assert torch.equal(DivPrune().select(tokens, torch.tensor([5, 20])), chosen)


# Pooling -----------------------------------------------------------------------------------------------------


def slow_runs(length: int, parts: int) -> list[list[int]]:
    """`parts` runs of consecutive places; place p belongs to run floor(p * parts / length)."""
    return [[p for p in range(length) if p * parts // length == run] for run in range(parts)]


def slow_cells(count: int, budget: int, grid: tuple[int, int]) -> list[list[int]]:
    """The cells of `count` bands, each as its tokens."""
    out = []
    for band, lines in enumerate(slow_runs(grid[0], count)):
        share = (band + 1) * budget // count - band * budget // count
        out += [[row * grid[1] + column for row in lines for column in run] for run in slow_runs(grid[1], share)]
    return out


def slow_bands(budget: int, grid: tuple[int, int]) -> int:
    """The number of bands for which tokens lie closest to the middles of their cells, were all bands equally high."""

    def squares(length: int, parts: int) -> int:
        return 12 * sum((p - (run[0] + run[-1]) / 2) ** 2 for run in slow_runs(length, parts) for p in run)

    rows, columns = grid
    costs = {}
    for count in range(-(-budget // columns), min(rows, budget) + 1):
        shares = [(band + 1) * budget // count - band * budget // count for band in range(count)]
        costs[count] = columns * squares(rows, count) + rows / count * sum(squares(columns, share) for share in shares)
    best = min(costs.values())
    return next(count for count, cost in costs.items() if cost <= best * (1 + 1e-6))


def slow_pooling(features: torch.Tensor, budget: int, grid: tuple[int, int]) -> dict[int, torch.Tensor]:
    """The mean of each cell by its central token."""
    pooled = {}
    for cell in slow_cells(slow_bands(budget, grid), budget, grid):
        (top, left), (bottom, right) = divmod(cell[0], grid[1]), divmod(cell[-1], grid[1])
        pooled[(top + bottom) // 2 * grid[1] + (left + right) // 2] = features[cell].mean(0)
    return pooled


@few
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_pooling_keeps_the_mean_of_each_cell_at_its_middle(rows, columns, data):
    budget = data.draw(st.integers(1, rows * columns))
    features = torch.randn(1, rows * columns, HIDDEN, generator=torch.Generator().manual_seed(budget))
    tokens = EncoderTokens((rows, columns), 1, DEVICE, features=features)
    chosen = Pooling().select(tokens, torch.tensor([budget]))
    merged = Pooling().merge(tokens, chosen)
    assert bands(torch.tensor([budget]), (rows, columns)).tolist() == [slow_bands(budget, (rows, columns))]
    pooled = slow_pooling(features[0], budget, (rows, columns))
    assert chosen[0].nonzero().flatten().tolist() == sorted(pooled) and len(pooled) == budget
    for token, mean in pooled.items():
        torch.testing.assert_close(merged[0, token], mean)


@pytest.mark.parametrize(
    ("budget", "grid", "count"),
    [(144, (24, 24), 12), (64, (24, 24), 8), (36, (6, 6), 6), (1, (6, 6), 1), (6, (2, 12), 1), (9, (6, 6), 3)],
)
def test_pooling_is_plain_average_pooling_where_the_cells_are_equal(budget, grid, count):
    features = torch.randn(1, grid[0] * grid[1], HIDDEN, generator=torch.Generator().manual_seed(budget))
    tokens = EncoderTokens(grid, 1, DEVICE, features=features)
    chosen = Pooling().select(tokens, torch.tensor([budget]))
    assert bands(torch.tensor([budget]), grid).tolist() == [count]
    picture = features.unflatten(1, grid).permute(0, 3, 1, 2)
    pooled = torch.nn.functional.avg_pool2d(picture, (grid[0] // count, grid[1] * count // budget))
    torch.testing.assert_close(Pooling().merge(tokens, chosen)[chosen], pooled[0].flatten(1).T)


@few
@given(st.integers(1, 30), st.integers(1, 30))
def test_spread_is_the_squared_distance_to_the_middle(length, parts):
    parts = min(length, parts)
    slow = sum((p - sum(run) / len(run)) ** 2 for run in slow_runs(length, parts) for p in run)
    assert math.isclose(int(spread(length, torch.tensor(parts))), 12 * slow, abs_tol=1e-6)


@few
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_pooling_cuts_about_as_compactly_as_any_number_of_bands(rows, columns, data):
    """The rule estimates; no other number of bands is much better."""
    budget = data.draw(st.integers(1, rows * columns))

    def cost(count: int) -> float:
        total = 0.0
        for cell in slow_cells(count, budget, (rows, columns)):
            places = torch.tensor([(i // columns, i % columns) for i in cell], dtype=torch.float64)
            total += float((places - places.mean(0)).square().sum())
        return total

    possible = [count for count in range(1, rows + 1) if -(-budget // columns) <= count <= budget]
    chosen = int(bands(torch.tensor([budget]), (rows, columns)))
    assert chosen in possible
    assert cost(chosen) <= 1.25 * min(cost(count) for count in possible) + 1


def test_a_cell_of_one_token_is_that_token():
    features = torch.randn(1, 12, HIDDEN, generator=torch.Generator().manual_seed(7))
    tokens = EncoderTokens((3, 4), 1, DEVICE, features=features)
    merged = Pooling().merge(tokens, torch.ones(1, 12, dtype=torch.bool))
    assert torch.equal(merged, features)
    assert cells(torch.tensor([12]), (3, 4))[2].all()
    pairs = mean_of_equals(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]))
    assert pairs.flatten().tolist() == [2.0, 2.0, 5.0]
