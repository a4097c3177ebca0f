"""Methods that choose tokens one after the other against slow, obvious re-implementations, ties and edges included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_maths_encoder import signs
from torch import Tensor

from foveate.methods.cdpruner import CDPruner, most_determinant, quality, relevance
from foveate.methods.greedy import covering_first, first_of
from foveate.methods.mmtok import MMTok, coverage
from foveate.methods.scope import SCOPE, salient_cover
from foveate.methods.tokens import EncoderTokens
from foveate.methods.words import words_that_count

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 1 << 30)
LIMITS = st.sampled_from([1, 40, 300, 1 << 27])
DEVICE = torch.device("cpu")


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def is_greedy(order: list[int], gains, exact: bool = False) -> bool:
    """Whether each choice is the best beside those before it, up to rounding; where exact, of equals the earlier.

    gains: from the chosen to {token: gain} of the others.
    """
    for step, pick in enumerate(order):
        left = gains(order[:step])
        best = max(left.values())
        if exact and pick != next(token for token, gain in left.items() if gain == best):
            return False
        if left[pick] < best - 1e-5 * max(1.0, abs(best)):
            return False
    return len(set(order)) == len(order)


# Coverage ----------------------------------------------------------------------------------------------------


def slow_gains(table: list[list[float]], value: list[float], chosen: list[int]) -> dict[int, float]:
    """What each other token adds to the sum over rows of the best entry so far, times its value."""
    best = [max((row[j] for j in chosen), default=0.0) for row in table]
    best = [max(0.0, entry) for entry in best]
    others = [j for j in range(len(value)) if j not in chosen]
    return {j: value[j] * sum(max(0.0, row[j] - b) for row, b in zip(table, best, strict=True)) for j in others}


@few
@given(st.integers(1, 12), st.integers(1, 14), st.booleans(), st.sampled_from([None, 1, 3]), st.data())
def test_coverage_is_added_to_greedily(rows, n, coarse, room, data):
    """Also where only a part of what changes is counted at each step, and that must be noticed."""
    rng, steps = torch.Generator().manual_seed(data.draw(seeds)), data.draw(st.integers(1, n))
    table = torch.randint(-2, 4, (2, rows, n), generator=rng) / 4 if coarse else torch.rand(2, rows, n, generator=rng)
    value = torch.randint(0, 3, (2, n), generator=rng).double()
    order = covering_first(table, value, steps, room)
    for tile in range(2):
        entries, worth = table[tile].tolist(), value[tile].tolist()
        gains = lambda chosen, e=entries, w=worth: slow_gains(e, w, chosen)  # noqa: E731
        assert is_greedy(order[tile].tolist(), gains, exact=coarse)


def test_counting_too_little_of_what_changes_is_noticed_and_mended():
    """Every token covers all rows better than the one before it: all of 400 rows change at every step."""
    table = (torch.arange(1, 41) / 40).expand(1, 400, 40).clone()
    value = 2.0 ** -torch.arange(40.0).double().unsqueeze(0)
    assert torch.equal(covering_first(table, value, 40, room=1), covering_first(table, value, 40))


def test_greedy_coverage_is_close_to_the_best_of_all_sets():
    table = torch.rand(1, 30, 10, generator=torch.Generator().manual_seed(1))
    order = covering_first(table, torch.ones(1, 10), 4)[0]
    sets = torch.combinations(torch.arange(10), 4)
    best = max(float(table[0][:, each].amax(1).sum()) for each in sets)
    worst = min(float(table[0][:, each].amax(1).sum()) for each in sets)
    reached = float(table[0][:, order].amax(1).sum())
    assert reached >= (1 - 1 / math.e) * best and reached > worst


# SCOPE -------------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 14), st.booleans(), st.sampled_from([0.0, 0.5, 1.0, 3.0]), LIMITS, st.data())
def test_scope_picks_as_the_slow_form(n, coarse, alpha, limit, data):
    seed, steps = data.draw(seeds), data.draw(st.integers(1, n))
    features = signs((3, n), seed) if coarse else noise(seed, 3, n, 6)
    saliency = torch.randint(1, 4, (3, n), generator=torch.Generator().manual_seed(seed)).float() * 0.01
    order = salient_cover(features, saliency, alpha, steps, limit)
    for tile, weight, picked in zip(features, saliency, order.tolist(), strict=True):
        table = [[cosine(tile[i], tile[j]) for j in range(n)] for i in range(n)]
        powers = [(float(s) / float(weight.max())) ** alpha for s in weight]
        assert is_greedy(picked, lambda chosen, t=table, p=powers: slow_gains(t, p, chosen))


def test_scope_between_coverage_alone_and_saliency_alone():
    features = torch.tensor([[[1.0, 0], [1, 0.2], [1, 0.1], [0, 1]]])
    saliency = torch.tensor([[0.1, 0.1, 1.0, 0.01]])
    assert salient_cover(features, saliency, 0.0, 2).tolist() == [[1, 3]], "what is between, and then what is unlike"
    assert salient_cover(features, saliency, 50.0, 4).tolist() == [[2, 1, 0, 3]], "by saliency, then by coverage"
    with pytest.raises(ValueError, match="alpha"):
        SCOPE(alpha=-1)
    with pytest.raises(ValueError, match="compare"):
        SCOPE(compare="keys")


@pytest.mark.parametrize("compare", ["states", "features"])
def test_scope_compares_what_it_is_told_to(compare):
    n = 9
    states, features, cls = noise(1, 2, n, 5), noise(2, 2, n, 6), torch.rand(2, 3, n)
    tokens = EncoderTokens((3, 3), 2, DEVICE, states=states, features=features, cls=cls, most=4)
    chosen = SCOPE(compare=compare).select(tokens, torch.tensor([4, 2]))
    order = salient_cover({"states": states, "features": features}[compare], cls[:, -1], 1.0, 4)
    assert chosen[0].nonzero().flatten().tolist() == sorted(order[0].tolist())
    assert chosen[1].nonzero().flatten().tolist() == sorted(order[1, :2].tolist())


# Words -------------------------------------------------------------------------------------------------------


def asked(seed: int, tiles: int = 2, m: int = 5, hidden: int = 6) -> tuple[Tensor, Tensor]:
    """Words of which the last tile has two fewer, and all but the first stand behind the picture."""
    words = noise(seed, tiles, m, hidden)
    words[-1, m - 2 :] = 0
    behind = (torch.arange(m) > 0).expand(tiles, -1) & words.any(-1)
    return words, behind


def test_words_behind_the_picture_count_or_all_where_there_are_none():
    words, behind = asked(3)
    behind = behind & torch.tensor([[True], [False]])
    tokens = EncoderTokens((1, 1), 2, DEVICE, words=words, behind=behind)
    assert words_that_count(tokens, "behind")[1].int().tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert words_that_count(tokens, "all")[1].int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    for method in (MMTok, CDPruner):
        with pytest.raises(ValueError, match="text"):
            method(text="question")


# MMTok -------------------------------------------------------------------------------------------------------


def softmax(row: list[float]) -> list[float]:
    most = max(row)
    total = sum(math.exp(x - most) for x in row)
    return [math.exp(x - most) / total for x in row]


def slow_coverage(features, states, words, alpha, word_temperature, patch_temperature) -> list[list[float]]:
    n, m = len(features), len(words)
    table = []
    for word in words:
        row = softmax([cosine(word, features[j]) / word_temperature for j in range(n)])
        table.append([entry / m for entry in row])
    for i in range(n):
        row = softmax([cosine(states[i], states[j]) / patch_temperature for j in range(n)])
        table.append([alpha * entry / n for entry in row])
    return table


@few
@given(st.integers(1, 10), st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from(["behind", "all"]), st.data())
def test_mmtok_covers_words_and_patches_as_the_slow_form(n, alpha, text, data):
    seed, steps = data.draw(seeds), data.draw(st.integers(1, n))
    features, states = noise(seed, 2, n, 6), noise(seed + 1, 2, n, 4)
    words, behind = asked(seed + 2)
    tokens = EncoderTokens((1, n), 2, DEVICE, features=features, states=states, words=words, behind=behind, most=steps)
    method = MMTok(alpha=alpha, text=text, word_temperature=0.2)
    chosen = method.select(tokens, torch.tensor([steps, 1]))
    table = coverage(features, states, *words_that_count(tokens, text), alpha, 0.2, 0.2)
    for tile, count in ((0, steps), (1, 1)):
        own = words[tile, (1 if text == "behind" else 0) : (5, 3)[tile]]
        slow = slow_coverage(features[tile], states[tile], own, alpha, 0.2, 0.2)
        fast = [row for row in table[tile].tolist() if any(row)]
        torch.testing.assert_close(torch.tensor(fast or [[0.0] * n]), torch.tensor([r for r in slow if any(r)]))
        order = covering_first(table[tile : tile + 1], torch.ones(1, n), count)[0].tolist()
        assert chosen[tile].nonzero().flatten().tolist() == sorted(order)
        assert is_greedy(order, lambda picked, t=slow: slow_gains(t, [1.0] * n, picked))


def test_mmtok_keeps_what_the_question_names():
    features = torch.eye(6)[None]
    word = features[:, 4:5] + 0.01
    tokens = EncoderTokens(
        (2, 3), 1, DEVICE, features=features, states=torch.ones(1, 6, 3), words=word, behind=word.any(-1), most=1
    )
    assert MMTok().select(tokens, torch.tensor([1])).nonzero()[:, 1].tolist() == [4]


# CDPruner ----------------------------------------------------------------------------------------------------


def slow_relevance(features: Tensor, words: Tensor) -> list[float]:
    mean = [sum(cosine(token, word) for word in words) / len(words) for token in features]
    low, high = min(mean), max(mean)
    return [1.0 if high - low < 1e-6 else (value - low) / (high - low) for value in mean]


def slow_kernel(features: Tensor, relevant: list[float], weight: float) -> Tensor:
    worth = relevant if weight == 1 else [math.exp(weight / (2 * (1 - weight)) * r) for r in relevant]
    n = len(features)
    rows = [[worth[i] * cosine(features[i], features[j]) * worth[j] for j in range(n)] for i in range(n)]
    return torch.tensor(rows, dtype=torch.float64)


def slow_determinants(kernel: Tensor, chosen: list[int]) -> dict[int, float]:
    """By what each other token multiplies the determinant of the kernel of the chosen."""
    before = float(torch.linalg.det(kernel[chosen][:, chosen])) if chosen else 1.0
    others = [j for j in range(len(kernel)) if j not in chosen]
    return {j: float(torch.linalg.det(kernel[[*chosen, j]][:, [*chosen, j]])) / before for j in others}


@few
@given(st.integers(2, 9), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), LIMITS, st.data())
def test_cdpruner_multiplies_the_determinant_by_most(n, weight, limit, data):
    seed, steps = data.draw(seeds), data.draw(st.integers(1, n - 1))
    features, words = noise(seed, 2, n, 12), noise(seed + 1, 2, 3, 12)
    relevant = relevance(features, words, torch.ones(2, 3, dtype=torch.bool))
    order = most_determinant(features, quality(relevant, weight), steps, limit)
    for tile in range(2):
        slow = slow_relevance(features[tile], words[tile])
        torch.testing.assert_close(relevant[tile].double(), torch.tensor(slow).double(), atol=1e-5, rtol=1e-5)
        kernel = slow_kernel(features[tile], slow, weight)
        # What comes first of equals rests on rounding here.
        picked = order[tile].tolist()
        for step, pick in enumerate(picked):
            gains = slow_determinants(kernel, picked[:step])
            assert gains[pick] >= max(gains.values()) * (1 - 1e-3) - 1e-9


def test_cdpruner_goes_on_with_the_most_relevant_once_nothing_is_new():
    """Seven copies of two directions: two tokens span all there is."""
    features = torch.eye(2)[[0, 0, 1, 1, 0, 1, 0]][None]
    worth = torch.tensor([[0.1, 0.5, 0.9, 0.2, 0.3, 0.4, 1.0]], dtype=torch.float64)
    assert most_determinant(features, worth, 7).tolist() == [[6, 2, 1, 5, 4, 3, 0]]
    assert most_determinant(features, torch.ones_like(worth), 7)[0, :2].tolist() == [0, 2]


def test_relevance_says_nothing_where_all_tokens_are_alike():
    assert (relevance(torch.ones(1, 5, 3), noise(1, 1, 2, 3), torch.ones(1, 2, dtype=torch.bool)) == 1).all()


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_cdpruner_chooses_in_each_half_by_itself(n):
    features, (words, behind) = noise(n, 2, n, 16), asked(n, hidden=16)
    tokens = EncoderTokens((1, n), 2, DEVICE, features=features, words=words, behind=behind, most=n)
    for budget in range(1, n + 1):
        both = torch.tensor([budget, max(1, budget - 1)])
        chosen = CDPruner(text="behind").select(tokens, both)
        assert chosen.sum(-1).tolist() == both.tolist()
        first = -(-n // 2)
        for tile in range(2):
            for half, count in ((slice(0, first), -(-int(both[tile]) // 2)), (slice(first, n), int(both[tile]) // 2)):
                if count:
                    part = features[tile : tile + 1, half]
                    counts = behind[tile : tile + 1]
                    worth = quality(relevance(part, words[tile : tile + 1], counts), 0.5)
                    order = most_determinant(part, worth, count)
                    assert torch.equal(chosen[tile, half], first_of(order, torch.tensor([count]), part.shape[1])[0])


def test_cdpruner_reads_no_question_at_weight_0():
    features = noise(5, 1, 8, 16)
    method = CDPruner(weight=0, halves=False)
    assert method.reads == {"features"} and "words" in CDPruner().reads
    chosen = method.select(EncoderTokens((2, 4), 1, DEVICE, features=features, most=3), torch.tensor([3]))
    order = most_determinant(features, torch.ones(1, 8, dtype=torch.float64), 3)
    assert chosen[0].nonzero().flatten().tolist() == sorted(order[0].tolist())
    with pytest.raises(ValueError, match="weight"):
        CDPruner(weight=1.5)
