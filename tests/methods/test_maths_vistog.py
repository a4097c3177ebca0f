"""VisToG's maths against a slow, obvious re-implementation, ties and empty groups included."""

from __future__ import annotations

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from foveate.methods.tokens import EncoderTokens
from foveate.methods.vistog import VisToG, centroids, mean_of_members, members

few = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 1 << 30)
sides = st.integers(1, 7)
groupings, places = st.sampled_from(["hard", "soft"]), st.sampled_from(["centroid", "first"])
HIDDEN, WIDTH = 6, 5


def slow_vistog(weights, readers, states, grouping, place):
    """The patch whose place each group takes, and (m, width) the groups, patch by patch.

    readers: (m, width). states: (n, width).
    """

    def layer(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def normed(name, x):
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    query = [layer("query", normed("group_norm", x)) for x in readers]
    key = [layer("key", normed("patch_norm", x)) for x in states]
    fits = [[float(q @ k) / math.sqrt(len(q)) for k in key] for q in query]
    m, n = len(query), len(key)
    group_of = [max(range(m), key=lambda i: fits[i][j]) for j in range(n)]
    groups = []
    for i in range(m):
        if grouping == "soft":
            total = sum(math.exp(fit - max(fits[i])) for fit in fits[i])
            shares = [math.exp(fit - max(fits[i])) / total for fit in fits[i]]
        else:
            shares = [(group_of[j] == i) / (group_of.count(i) + 1.0) for j in range(n)]
        mean = sum(share * layer("value", x) for share, x in zip(shares, states, strict=True))
        groups.append(readers[i] + layer("out", mean))
    if place == "first":
        return list(range(m)), torch.stack(groups)
    places = [max((j for j in range(n) if group_of[j] == i), key=lambda j: fits[i][j], default=None) for i in range(m)]
    left = iter([j for j in range(n) if j not in places])
    return [next(left) if at is None else at for at in places], torch.stack(groups)


def vistog_of(width: int, m: int, seed: int, **options) -> tuple[VisToG, torch.Generator]:
    rng = torch.Generator().manual_seed(seed)
    method = VisToG(keep=m, **options)
    weights = {"seeds": torch.randn(m, width, generator=rng)}
    for name in ("query", "key", "value", "out"):
        weights[f"{name}.weight"] = torch.randn(width, width, generator=rng)
    for name in ("query", "key", "value", "out", "group_norm", "patch_norm"):
        weights[f"{name}.bias"] = torch.randn(width, generator=rng)
        weights.setdefault(f"{name}.weight", 1 + torch.rand(width, generator=rng))
    weights |= {
        f"projector.{name}": torch.randn(shape, generator=rng)
        for name, shape in (("weight", (HIDDEN, width)), ("bias", (HIDDEN,)))
    }
    return method.holding(weights), rng


def clear(values: torch.Tensor) -> bool:
    """Whether the largest of each column, (tiles, m, n), is the largest beyond rounding."""
    first, *others = values.topk(min(2, values.shape[1]), dim=1).values.unbind(1)
    return all(bool(((first - other) > 1e-4).logical_or(other.isinf()).all()) for other in others)


@few
@given(
    sides, sides, st.integers(1, 6), st.sampled_from(["hard", "soft"]), st.sampled_from(["centroid", "first"]), seeds
)
def test_vistog_equals_a_slow_grouping(rows, columns, m, grouping, place, seed):
    method, rng = vistog_of(WIDTH, m, seed, grouping=grouping, carriers=place)
    tiles, n = 2, rows * columns
    states, readers = torch.randn(tiles, n, WIDTH, generator=rng), torch.randn(tiles, m, WIDTH, generator=rng)
    projector = torch.nn.Linear(WIDTH, HIDDEN)
    tokens = EncoderTokens(
        (rows, columns),
        tiles,
        torch.device("cpu"),
        states=states,
        readers=readers,
        features=projector(states),
        project=projector,
    )
    fits = method._affinity(tokens)
    assume(clear(fits) and clear(fits.masked_fill(~members(fits), -torch.inf).mT))  # near ties go either way
    keep = method.select(tokens, torch.full((tiles,), m))
    becomes = method.merge(tokens, keep)
    if n <= m:
        assert keep.all() and becomes is None
        return
    weight, bias = method.tensors["projector.weight"], method.tensors["projector.bias"]
    for tile in range(tiles):
        at, groups = slow_vistog(method.tensors, readers[tile], states[tile], grouping, place)
        assert sorted(at) == keep[tile].nonzero().flatten().tolist()
        torch.testing.assert_close(becomes[tile, at], groups @ weight.T + bias, atol=1e-4, rtol=1e-4)


@few
@given(st.integers(1, 6), st.integers(6, 12), seeds)
def test_every_patch_is_in_one_group_and_every_group_has_a_place_of_its_own(m, n, seed):
    # Whole numbers: ties are common.
    fits = torch.randint(0, 3, (3, m, n), generator=torch.Generator().manual_seed(seed)).float()
    joins, at = members(fits), centroids(fits)
    assert (joins.sum(1) == 1).all() and (joins.sum((1, 2)) == n).all()
    for tile in range(3):
        assert len(set(at[tile].tolist())) == m
        for group in range(m):
            if joins[tile, group].any():
                assert joins[tile, group, at[tile, group]]
                assert fits[tile, group, at[tile, group]] == fits[tile, group][joins[tile, group]].max()


def test_an_empty_group_adds_nothing_and_a_small_one_little():
    joins = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert mean_of_members(joins, torch.full((3, 2), 4.0)).tolist() == [[3.0, 3.0], [0.0, 0.0]]
