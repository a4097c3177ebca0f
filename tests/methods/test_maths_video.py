"""The maths of methods that look at all frames of a clip, against slow, obvious re-implementations in plain Python."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity as cosine

from foveate.layout import ImageLayout, Tile, as_clip
from foveate.methods.base import Method
from foveate.methods.budgets import share_out
from foveate.methods.clip_baselines import RandomClip, UniformFrames
from foveate.methods.dycoke import DyCoke
from foveate.methods.evs import EVS
from foveate.methods.fastvid import FastVID
from foveate.methods.holitom import HoliTom
from foveate.methods.selection import kept_tokens, select_tokens, tile_budgets
from foveate.methods.tokens import EncoderTokens, VideoTokens
from foveate.methods.vidcom2 import VidCom2

few = settings(max_examples=40, deadline=None)
seeds, sides, lengths = st.integers(0, 1 << 30), st.integers(1, 4), st.integers(1, 9)
keeps = st.floats(0.02, 1.0)
DEVICE, HIDDEN = torch.device("cpu"), 6
ALL = [EVS(), VidCom2(), DyCoke(), FastVID(segments=2, alike=0.5), HoliTom(alike=0.6), RandomClip(), UniformFrames()]
methods = pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)


def clips_of(clips: int, frames: int, grid: tuple[int, int], seed: int = 0, **known) -> VideoTokens:
    """Clips in which most places stand still from frame to frame, as they do in films."""
    rng, n = torch.Generator().manual_seed(seed), grid[0] * grid[1]
    still = torch.randn(clips, 1, n, HIDDEN, generator=rng)
    moves = torch.rand(clips, frames, n, 1, generator=rng) < 0.3
    features = torch.where(moves.cumsum(1) > 0, torch.randn(clips, frames, n, HIDDEN, generator=rng), still)
    features = features + 0.2 * torch.randn(features.shape, generator=rng)
    cls = torch.rand(clips, frames, 2, n, generator=rng)
    return VideoTokens(grid, clips, frames, DEVICE, features=features, cls=cls, **known)


def budget_of(keep: float, tokens: VideoTokens) -> Tensor:
    """As the engine makes it: at least one token a frame."""
    return torch.tensor([max(tokens.frames, int(keep * tokens.frames * tokens.n))] * tokens.clips)


# Sharing out -------------------------------------------------------------------------------------------------


@few
@given(st.lists(st.tuples(st.floats(0.01, 9), st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=8), seeds)
def test_shares_sum_to_the_total_and_keep_their_bounds(parts, seed):
    weights = torch.tensor([[weight for weight, *_ in parts]], dtype=torch.float64)
    low = torch.tensor([[low for _, low, _ in parts]])
    high = torch.tensor([[low + more for _, low, more in parts]])
    total = seed % (int(high.sum()) + 3)
    shares = share_out(weights, torch.tensor([total]), low, high)
    assert ((shares >= low) & (shares <= high)).all()
    assert int(shares.sum()) == min(max(total, int(low.sum())), int(high.sum()))


@few
@given(st.lists(st.floats(0.1, 9), min_size=1, max_size=8), st.integers(0, 60))
def test_shares_are_those_of_the_largest_remainder(weights, total):
    exact = [total * weight / sum(weights) for weight in weights]
    expected = [math.floor(share + 1e-9) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: expected[i] - exact[i])[: total - sum(expected)]:
        expected[i] += 1
    found = share_out(torch.tensor(weights), torch.tensor(total), 0, 10**6).tolist()
    assert sum(found) == total and max(abs(a - b) for a, b in zip(found, exact, strict=True)) < 1
    ties = len({round(share % 1, 6) for share in exact}) < len(exact)
    assert ties or found == expected


# What holds for all of them ----------------------------------------------------------------------------------


@few
@given(st.sampled_from(ALL), st.integers(1, 3), lengths, sides, sides, keeps, seeds)
def test_every_clip_keeps_its_budget(method, clips, frames, rows, columns, keep, seed):
    tokens = clips_of(clips, frames, (rows, columns), seed)
    budget = budget_of(keep, tokens)
    chosen, becomes = method.choose(replace(tokens, most=int(budget.max())), budget)
    assert chosen.dtype == torch.bool and chosen.shape == (clips, frames, rows * columns)
    kept = chosen.flatten(1).sum(-1)
    whole = {"evs": tokens.n, "dycoke": math.ceil(frames / 4) * tokens.n}.get(method.name, 0)
    if method.name == "holitom":  # where merging alone saves more than was asked for
        assert (kept <= budget).all() and (kept > 0).all()
    else:
        assert kept.tolist() == [max(b, whole) for b in budget.tolist()]
    assert becomes is None or (becomes.shape == tokens.features.shape and becomes.dtype == tokens.features.dtype)
    assert (becomes is None) == method.only_drops


@methods
def test_a_clip_is_treated_the_same_in_any_company(method):
    tokens, budget = clips_of(3, 6, (3, 4), seed=1), torch.tensor([11, 30, 50])
    together, merged = method.choose(replace(tokens, most=50), budget)
    for clip in range(3):
        alone = replace(
            tokens,
            clips=1,
            features=tokens.features[clip : clip + 1],
            cls=tokens.cls[clip : clip + 1],
            most=None if clip else 11,
        )
        chosen, becomes = method.choose(alone, budget[clip : clip + 1])
        assert torch.equal(chosen[0], together[clip])
        if merged is not None:
            kept = chosen[0]
            assert torch.allclose(becomes[0][kept], merged[clip][kept], atol=1e-5)


@methods
def test_everything_stays_what_it_is_where_all_may_stay(method):
    tokens = clips_of(2, 5, (2, 3), seed=2)
    if method.name == "holitom":
        method = replace(method, alike=1.0)  # nothing stands still, so there is nothing to merge
    if method.name == "fastvid":  # in a segment of several frames anchors gather what stays, too
        method = replace(method, segments=5)
    chosen, becomes = method.choose(tokens, torch.tensor([30, 30]))
    assert chosen.all()
    assert becomes is None or torch.allclose(becomes, tokens.features, atol=1e-5)


@methods
def test_nothing_waits_for_the_device(method):
    """Meta tensors hold no numbers, so that whatever asks for one fails."""
    tokens = clips_of(2, 5, (2, 3), most=12)
    tokens = replace(
        tokens, features=tokens.features.to("meta"), cls=tokens.cls.to("meta"), device=torch.device("meta")
    )
    chosen, _ = method.choose(tokens, torch.tensor([12, 12], device="meta"))
    assert chosen.is_meta and chosen.dtype == torch.bool


@methods
def test_half_precision_of_huge_states_does_not_overflow(method):
    tokens = clips_of(2, 5, (2, 3), seed=3)
    tokens = replace(tokens, features=(tokens.features * 1e4).half())
    chosen, becomes = method.choose(tokens, torch.tensor([12, 12]))
    assert becomes is None or (becomes.dtype == torch.half and becomes[chosen].isfinite().all())


@methods
def test_methods_survive_json(method):
    again = Method.from_dict(json.loads(json.dumps(method.to_dict())))
    assert again == method and type(again) is type(method)


@methods
def test_a_picture_is_a_clip_of_one_frame(method):
    tokens = clips_of(2, 1, (3, 4), seed=4)
    flat = {name: getattr(tokens, name)[:, 0] for name in ("features", "cls")}
    still = EncoderTokens((3, 4), 2, DEVICE, **flat)
    chosen, becomes = method.choose(tokens, torch.tensor([5, 5]))
    assert torch.equal(method.select(still, torch.tensor([5, 5])), chosen[:, 0])
    assert chosen.all() if method.name in ("evs", "dycoke") else (chosen.flatten(1).sum(-1) == 5).all()
    merged = method.merge(still, chosen[:, 0])
    assert merged is None if becomes is None else torch.equal(merged, becomes[:, 0])


@pytest.mark.parametrize(
    ("cls", "option", "value"),
    [
        (VidCom2, "temperature", 0.0),
        (FastVID, "context", 1.5),
        (FastVID, "segments", 0),
        (FastVID, "alike", 2),
        (FastVID, "every", 0),
        (FastVID, "own", -0.1),
        (HoliTom, "alike", -2),
        (HoliTom, "own", 2),
        (HoliTom, "neighbours", 0),
        (RandomClip, "seed", -1),
    ],
)
def test_bad_options_name_their_range(cls, option, value):
    with pytest.raises(ValueError, match=rf"{option} must be"):
        cls(**{option: value})


# Each by itself ----------------------------------------------------------------------------------------------


def ranked(scores: dict[tuple[int, int], float], count: int) -> set[tuple[int, int]]:
    """The `count` places with the highest scores; of equals the earlier."""
    return set(sorted(scores, key=lambda place: (-scores[place], place))[:count])


def found(chosen: Tensor) -> set[tuple[int, int]]:
    return {(f, i) for f, i in chosen.nonzero().tolist()}


@few
@given(lengths, sides, keeps, seeds)
def test_evs_keeps_the_first_frame_and_what_changed_most(frames, side, keep, seed):
    tokens = clips_of(1, frames, (side, side), seed)
    budget, x = budget_of(keep, tokens), tokens.features[0]
    scores = {
        (f, i): math.inf if f == 0 else 1 - float(cosine(x[f, i], x[f - 1, i], dim=0))
        for f in range(frames)
        for i in range(tokens.n)
    }
    assert found(EVS().choose(tokens, budget)[0][0]) == ranked(scores, max(int(budget), tokens.n))


@few
@given(lengths, sides, keeps, seeds)
def test_dycoke_keeps_the_first_of_four_frames_and_what_repeats_it_least(frames, side, keep, seed):
    tokens = clips_of(1, frames, (side, side), seed)
    budget, x = int(budget_of(keep, tokens)), tokens.features[0]
    expected = {(f, i) for f in range(0, frames, 4) for i in range(tokens.n)}
    others = [f for f in range(frames) if f % 4]
    left = max(0, budget - len(expected))
    for number, f in enumerate(others):
        other = {1: f - 1, 2: f - 2, 3: f - 1}[f % 4]
        share = min(tokens.n, left // len(others) + (number < left % len(others)))
        alike = {(f, i): -float(cosine(x[f, i], x[other, i], dim=0)) for i in range(tokens.n)}
        expected |= ranked(alike, share)
    assert found(DyCoke().choose(tokens, torch.tensor([budget]))[0][0]) == expected


def test_dycoke_s_default_is_the_authors_merging_ratio():
    """0.7 of three frames of four: of 4 x 10 tokens 10 + 3 x 3 stay."""
    tokens = clips_of(1, 8, (2, 5))
    chosen, _ = DyCoke().choose(tokens, torch.tensor([int(DyCoke().keep * 80)]))
    assert chosen[0].sum(-1).tolist() == [10, 3, 3, 3, 10, 3, 3, 3]


@few
@given(lengths, sides, keeps, seeds, st.sampled_from([0.01, 0.3]))
def test_vidcom2_keeps_what_is_unlike_its_clip_and_its_frame(frames, side, keep, seed, temperature):
    tokens = clips_of(1, frames, (side, side), seed)
    budget, x, n = budget_of(keep, tokens), tokens.features[0], tokens.n
    spread = x.flatten(0, 1).var(0, correction=0).tolist()
    quiet = sorted(range(HIDDEN), key=lambda c: spread[c])[: HIDDEN // 2]
    points = torch.stack([x[..., c] for c in sorted(quiet)], -1)
    points = points / points.norm(dim=-1, keepdim=True)

    def likeness(point: Tensor, center: Tensor) -> float:
        far = float((point - center).square().sum())
        return sum(math.exp(-far / (2 * 2**k)) for k in (-3, -2, -1, 0, 1))

    of_clip = [[likeness(p, points.mean((0, 1))) for p in points[f]] for f in range(frames)]
    total = [
        [a + likeness(p, points[f].mean(0)) for a, p in zip(of_clip[f], points[f], strict=True)] for f in range(frames)
    ]
    alone = [-sum(row) / n / temperature for row in of_clip]
    weights = [math.exp(a - max(alone)) for a in alone]
    shares = [1 + w / sum(weights) - 1 / frames for w in weights]
    counts = share_out(torch.tensor(shares), budget[0], 1, n).tolist()
    chosen = VidCom2(temperature=temperature).choose(tokens, budget)[0][0]
    kept = chosen.sum(-1).tolist()
    # A low temperature makes of rounding a token that goes to another frame.
    assert sum(kept) == sum(counts) and all(abs(a - b) <= 1 for a, b in zip(kept, counts, strict=True))
    for f in range(frames):
        expected = ranked({(f, i): -total[f][i] for i in range(n)}, kept[f])
        odd = found(chosen) - expected - {(g, i) for g in range(frames) if g != f for i in range(n)}
        worst = max(total[g][i] for g, i in expected)
        assert all(total[f][i] <= worst + 1e-5 for _, i in odd)


def test_vidcom2_gives_more_to_a_frame_that_stands_out():
    tokens = clips_of(1, 6, (3, 3), seed=5)
    x = tokens.features[:, :1].repeat(1, 6, 1, 1)
    x[0, 3] = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(6))
    shares = VidCom2().choose(replace(tokens, features=x), torch.tensor([18]))[0][0].sum(-1)
    assert shares.argmax() == 3 and shares.sum() == 18 and (shares >= 1).all()


def slow_peaks(points: list[Tensor], neighbours: int) -> list[float]:
    """Density x separation, as logarithms of float64 numbers, of points in a row."""
    far = [[float((a - b).double().norm()) / math.sqrt(len(a)) for b in points] for a in points]
    density = [-sum(sorted(x * x for x in row)[:neighbours]) / neighbours for row in far]
    widest, scores = max(map(max, far)), []
    for i, mine in enumerate(density):
        denser = [far[i][j] for j, other in enumerate(density) if other > mine or (other == mine and j < i)]
        scores.append(mine + math.log(max(min(denser, default=widest), 1e-38)))
    return scores


def slow_segments(x: Tensor, alike: float, fewest: int) -> list[list[int]]:
    means = x.mean(1)
    near = [float(cosine(means[f], means[f + 1], dim=0)) for f in range(len(x) - 1)]
    lowest = sorted(range(len(near)), key=lambda f: near[f])[: fewest - 1]
    cuts = sorted({f for f, value in enumerate(near) if value < alike} | set(lowest))
    bounds = [0, *(cut + 1 for cut in cuts), len(x)]
    return [list(range(a, b)) for a, b in itertools.pairwise(bounds)]


def slow_fastvid(x: Tensor, cls: Tensor, budget: int, method: FastVID) -> dict[tuple[int, int], Tensor]:
    """What each kept token becomes."""
    frames, n = x.shape[:2]
    each = [min(n, budget // frames + (f < budget % frames)) for f in range(frames)]
    context = [math.floor(method.context * count + 1e-6) for count in each]
    salient = [sorted(range(n), key=lambda i: (-float(cls[f, i]), i))[: each[f] - context[f]] for f in range(frames)]
    others = [[i for i in range(n) if i not in salient[f]] for f in range(frames)]
    room = n - max(map(len, salient))
    every = min(method.every, max(1, room // max(1, max(context))))
    kept = {(f, i): x[f, i] for f in range(frames) for i in salient[f]}
    for segment in slow_segments(x, method.alike, method.segments):
        anchors = [f for f in segment if (segment[-1] - f) % every == 0]
        total = sum(context[f] for f in segment)
        everyone = [x[f, i] for f in segment for i in others[f]]
        for rank, f in enumerate(anchors):
            count = total // len(anchors) + (rank < total % len(anchors))
            score = slow_peaks([x[f, i] for i in others[f]], min(4, len(others[f]))) if others[f] else []
            picks = sorted(range(len(score)), key=lambda i: -score[i])[:count]
            targets = sorted(others[f][pick] for pick in picks)
            gathers: dict[int, list[Tensor]] = {target: [] for target in targets}
            for token in everyone if targets else ():
                gathers[max(targets, key=lambda t: float(cosine(token, x[f, t], dim=0)))].append(token)
            for target, tokens in gathers.items():
                own = max(method.own, 1 / (len(tokens) + 1))
                mean = torch.stack(tokens).mean(0) if tokens else x[f, target]
                kept[f, target] = own * x[f, target] + (1 - own) * mean
    return kept


@few
@given(lengths, sides, keeps, seeds, st.sampled_from([FastVID(), *(FastVID(segments=2, alike=a) for a in (-1.0, 0.6))]))
def test_fastvid_keeps_the_salient_and_lets_anchors_gather_the_rest(frames, side, keep, seed, method):
    tokens = clips_of(1, frames, (side, side), seed)
    budget = budget_of(keep, tokens)
    expected = slow_fastvid(tokens.features[0], tokens.cls[0, :, -1], int(budget), method)
    chosen, becomes = method.choose(tokens, budget)
    assert found(chosen[0]) == set(expected)
    for place, value in expected.items():
        assert torch.allclose(becomes[0][place], value, atol=1e-5)


def slow_windows(x: Tensor, alike: float) -> list[tuple[int, int]]:
    """Every way of cutting, the one that saves most; of equals the one whose windows from the end are shorter."""
    frames = len(x)
    pairs = [(x[f], x[f + 1]) for f in range(frames - 1)]
    moves = [[float(cosine(a, b, dim=0)) <= alike for a, b in zip(one, other, strict=True)] for one, other in pairs]

    def saved(start: int, end: int) -> int:
        return sum(not any(moves[f][i] for f in range(start, end)) for i in range(x.shape[1])) * (end - start)

    best: dict[int, tuple[int, list[tuple[int, int]]]] = {0: (0, [])}
    for end in range(1, frames + 1):
        options = [
            (best[start][0] + saved(start, end - 1), [*best[start][1], (start, end - 1)])
            for start in range(end - 1, -1, -1)
        ]
        best[end] = max(options, key=lambda option: option[0])
    return best[frames][1]


def slow_holitom(x: Tensor, cls: Tensor, budget: int, method: HoliTom) -> dict[tuple[int, int], Tensor]:
    frames, n = x.shape[:2]
    heads: dict[int, dict[int, Tensor]] = {f: {} for f in range(frames)}
    moving = {f: list(range(n)) for f in range(frames)}
    for start, end in slow_windows(x, method.alike):
        for i in range(n) if end > start else ():
            if all(float(cosine(x[f, i], x[f + 1, i], dim=0)) > method.alike for f in range(start, end)):
                heads[start][i] = x[start : end + 1, i].mean(0)
                for f in range(start, end + 1):
                    moving[f].remove(i)
    sizes = [*(len(heads[f]) for f in range(frames)), *(len(moving[f]) for f in range(frames))]
    total = torch.tensor(min(budget, sum(sizes)))
    shares = share_out(torch.tensor(sizes) + 1e-9, total, 0, torch.tensor(sizes)).tolist()
    kept = {}
    for f in range(frames):
        for i in sorted(moving[f], key=lambda i: (-float(cls[f, i]), i))[: shares[frames + f]]:
            kept[f, i] = x[f, i]
        count, places = shares[f], sorted(heads[f])
        if not count:
            continue
        points = [heads[f][i] for i in places]
        score = slow_peaks(points, min(method.neighbours, count))
        centers = sorted(range(len(places)), key=lambda i: -score[i])[:count]
        gathers: dict[int, list[Tensor]] = {center: [] for center in centers}
        for i, point in enumerate(points):
            if i not in centers:
                gathers[min(centers, key=lambda c: float((point - points[c]).norm()))].append(point)
        for center, others in gathers.items():
            mean = torch.stack(others).mean(0) if others else points[center]
            kept[f, places[center]] = method.own * points[center] + (1 - method.own) * mean
    return kept


@few
@given(lengths, sides, keeps, seeds, st.sampled_from([HoliTom(), HoliTom(alike=0.6), HoliTom(alike=-1.0, own=0.3)]))
def test_holitom_merges_what_stands_still_and_ranks_the_rest(frames, side, keep, seed, method):
    tokens = clips_of(1, frames, (side, side), seed)
    budget = budget_of(keep, tokens)
    expected = slow_holitom(tokens.features[0], tokens.cls[0, :, -1], int(budget), method)
    chosen, becomes = method.choose(tokens, budget)
    assert found(chosen[0]) == set(expected)
    for place, value in expected.items():
        assert torch.allclose(becomes[0][place], value, atol=1e-5)


def test_whole_frames_are_kept_at_an_even_stride():
    tokens = clips_of(1, 8, (2, 3))
    assert UniformFrames().choose(tokens, torch.tensor([12]))[0][0].all(-1).nonzero().flatten().tolist() == [1, 5]
    rest = UniformFrames().choose(tokens, torch.tensor([14]))[0][0].sum(-1)
    assert sorted(rest.tolist()) == [0, 0, 0, 0, 1, 1, 6, 6]


def test_a_draw_over_a_clip_is_no_draw_inside_each_frame():
    tokens = clips_of(1, 8, (4, 4))
    chosen = RandomClip().choose(tokens, torch.tensor([32]))[0][0]
    assert len(set(chosen.sum(-1).tolist())) > 1 and chosen.sum() == 32
    assert not torch.equal(chosen, RandomClip(seed=1).choose(tokens, torch.tensor([32]))[0][0])


# Clips among pictures ----------------------------------------------------------------------------------------


def picture(rows: int, columns: int, first: int, pinned: int = 0) -> ImageLayout:
    index = torch.arange(rows * columns)
    return ImageLayout(rows * columns + pinned, (Tile(index, (rows, columns), first + index),))


def test_pictures_become_the_frames_of_a_clip():
    clip = as_clip([picture(2, 3, 0, pinned=1), picture(2, 3, 6, pinned=1), picture(2, 3, 12)])
    assert (clip.tokens, clip.frames, clip.pinned) == (20, 3, 2)
    assert [tile.index[0].item() for tile in clip.tiles] == [0, 7, 14]
    assert clip.tracks == [[0, 1, 2]] and picture(2, 3, 0).frames == 1


def test_an_int_is_tokens_per_frame_and_a_fraction_of_the_clip():
    clip = as_clip([picture(2, 3, 6 * f) for f in range(4)])
    assert tile_budgets(clip, 2) == [2, 2, 2, 2] and kept_tokens(clip, 0.5) == 12
    assert tile_budgets(picture(2, 3, 0), 2) == [2]


def test_clips_and_pictures_of_many_shapes_are_asked_together():
    layouts = [
        picture(2, 3, 0),
        as_clip([picture(2, 3, 6 + 6 * f, pinned=1) for f in range(5)]),
        as_clip([picture(1, 4, 36 + 4 * f) for f in range(3)]),
    ]
    rng = torch.Generator().manual_seed(0)
    features = [torch.randn(layout.tokens, HIDDEN, generator=rng) for layout in layouts]
    kept = select_tokens(EVS(keep=0.5), layouts, features, {}, lambda states: states)
    assert [int(each.stays.sum()) for each in kept] == [6, 17, 6]
    assert kept[1].stays[[6, 13, 20, 27, 34]].all(), "what is pinned stays"
    clip = features[1].view(5, 7, HIDDEN)[:, :6]
    alone = EVS().choose(VideoTokens((2, 3), 1, 5, DEVICE, features=clip[None]), torch.tensor([12]))[0]
    assert torch.equal(kept[1].stays.view(5, 7)[:, :6], alone[0])


def test_frames_of_different_shapes_cannot_be_compared():
    clip = as_clip([picture(2, 3, 0), picture(3, 2, 6)])
    with pytest.raises(Exception, match="frames of a clip, and these differ in shape"):
        select_tokens(EVS(), [clip], [torch.randn(12, HIDDEN)], {}, lambda states: states)
