"""Clips: same seed, same frames; one thing happens to each thing; every question has one right answer."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest

from foveate.glimpse import CLIP_KINDS, heldout_clips
from foveate.glimpse.clips import DIRECTIONS, LENGTHS, SIZE, imagine
from foveate.glimpse.happenings import ASK, STILL, backwards, clip_question, frozen, happenings, shuffled
from foveate.glimpse.scene import SHAPES, place


def clips(n: int = 200):
    return [imagine(np.random.default_rng(seed), LENGTHS[seed % len(LENGTHS)]) for seed in range(n)]


def cells(track):
    return [None if thing is None else thing.cell for thing in track.frames]


def test_a_seed_says_everything():
    one, again, other = (imagine(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == again and one != other
    assert [a.tobytes() for a in one.pictures()] == [b.tobytes() for b in again.pictures()]


def test_one_thing_at_most_happens_to_a_thing_and_no_cell_is_taken_twice():
    seen = set()
    for clip in clips():
        assert 2 <= len(clip.tracks) <= 4 and len({track.kind for track in clip.tracks}) == len(clip.tracks)
        assert any(track.frames[0] for track in clip.tracks), "the first frame is not empty"
        visited = [{cell for cell in cells(track) if cell is not None} for track in clip.tracks]
        assert sum(map(len, visited)) == len(set().union(*visited))
        for track, where in zip(clip.tracks, visited, strict=True):
            there = [thing is not None for thing in track.frames]
            comes_or_goes = sum(a != b for a, b in pairwise(there))
            colours = len({thing.detail for thing in track.seen})
            assert comes_or_goes + (len(where) > 1) + (colours > 1) <= 1
            assert colours == 1 or track.kind in SHAPES
            what, _, how = track.happening.partition(" ")
            seen.add(what)
            if what == "moves":
                down, right = DIRECTIONS[how]
                steps = [b - a for a, b in pairwise(cells(track))]
                assert {step for step in steps if step} == {3 * down + right} and len(where) <= 3
            elif what == "turns":
                assert how == track.frames[-1].detail != track.frames[0].detail
            else:
                assert there[0] is not (what == "appears") and there[-1] is not (what == "disappears")
            changed = [f for f in range(1, len(clip)) if track.frames[f] != track.frames[f - 1]]
            assert track.when == (changed[0] if changed else None) and (track.when is None) == (what == "nothing")
    assert seen == {"moves", "appears", "disappears", "turns", "nothing"}


def test_frames_change_where_something_happens_and_nowhere_else():
    """The background stands still."""
    for clip in clips(20):
        pictures = [np.asarray(picture, np.int64) for picture in clip.pictures()]
        assert {picture.shape for picture in pictures} == {(SIZE, SIZE, 3)} and len(pictures) == len(clip)
        for frame in range(1, len(clip)):
            events = any(track.frames[frame] != track.frames[frame - 1] for track in clip.tracks)
            assert (pictures[frame] != pictures[frame - 1]).any() == events


def test_a_clip_that_is_not_over_shows_only_what_has_been_seen():
    for clip in clips(60):
        assert clip.until(len(clip)) == clip
        half = clip.until(2)
        assert len(half) == 2 and [a.tobytes() for a in half.pictures()] == [b.tobytes() for b in clip.pictures()[:2]]
        for track in half.tracks:
            assert (track.happening == "nothing") == (track.frames[0] == track.frames[1])


def test_answers_follow_from_the_frames():
    seen = set()
    for clip in clips():
        tracks = {track.kind: track for track in clip.tracks}
        for fact in happenings(clip, np.random.default_rng(0)):
            kind, subject, answer = fact.kind, fact.subject, fact.answer
            seen.add(kind)
            track = tracks.get(subject)
            if kind == "direction":
                way = "nowhere" if track.happening == "nothing" else track.happening.removeprefix("moves ")
                assert answer == way
            elif kind in ("at_start", "at_end"):
                assert place(cells(track)[0 if kind == "at_start" else -1]) == answer
            elif kind == "where":
                assert {place(cell) for cell in cells(track)} == {answer}, "any frame answers it"
            elif kind == "happens":
                assert answer == track.happening
            elif kind == "colour_end":
                assert answer == track.frames[-1].detail
            elif kind in ("appears", "disappears"):
                assert [t.seen[0].name for t in tracks.values() if t.happening == kind] == [answer] * (
                    answer != "nothing"
                )
            elif kind == "moves_count":
                assert answer == str(sum("moves" in t.happening for t in tracks.values()))
            elif kind == "first":
                asked = subject.split(", ")
                assert tracks[answer].when < max(tracks[each].when for each in asked) and answer in asked
            elif kind == "exists":
                assert (answer == "yes") == (track is not None)
                assert track is None or all(track.frames), "any frame answers it"
            else:
                assert kind == "describe" and answer.count(",") == len(tracks) - 1
                for said, t in zip(answer.split(", "), tracks.values(), strict=True):
                    begins = f"{t.seen[0].name} {t.seen[0].place}"
                    assert said == (begins if t.happening == "nothing" else f"{begins} {t.happening}")
    assert seen == set(CLIP_KINDS)


def test_heldout_clips_are_what_they_were():
    questions = heldout_clips(24)
    assert [question.kind for question in questions] == [*CLIP_KINDS, *CLIP_KINDS]
    text = "\n".join(f"{item.kind} {item.question} {item.answer}" for item in questions)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "9d1abfad03c9a547", "raise CLIPS_VERSION"
    means = [np.asarray(item.images[-1], np.float64).mean() for item in questions]
    expected = [
        140, 136, 123, 166, 111, 124, 131, 118, 147, 159, 90, 184, 93, 134, 119, 70, 121, 111, 148, 147,
        138, 143, 159, 132,
    ]  # fmt: skip
    np.testing.assert_allclose(means, expected, atol=1.5)
    assert heldout_clips(2, first=7)[0].answer == heldout_clips(8)[7].answer
    assert {item.kind for item in heldout_clips(4, kinds=STILL)} == set(STILL)
    assert {len(item.images) for item in heldout_clips(4, frames=5)} == {5}


@pytest.mark.parametrize("kind", CLIP_KINDS)
@pytest.mark.parametrize("frames", LENGTHS)
@pytest.mark.sampled(5)
def test_every_kind_can_be_asked(kind, frames):
    item = clip_question(3, kind, frames)
    assert item.kind == kind and len(item.images) == frames and item.answer and len(ASK[kind]) >= 3


def test_a_yes_is_asked_for_as_often_as_a_no():
    answers = [item.answer for item in heldout_clips(100, kinds=("exists",))]
    assert set(answers) == {"yes", "no"} and 35 < answers.count("yes") < 65


def test_controls_take_time_away_and_nothing_else():
    questions = heldout_clips(12)
    for control in (shuffled(questions), backwards(questions)):
        for was, item in zip(questions, control, strict=True):
            assert item.images != was.images and sorted(map(id, item.images)) == sorted(map(id, was.images))
            assert (item.question, item.answer, item.kind) == (was.question, was.answer, was.kind)
    assert backwards(backwards(questions)) == questions and shuffled(questions) == shuffled(questions)
    for was, item in zip(questions, frozen(questions), strict=True):
        assert len(item.images) == len(was.images) and len(set(map(id, item.images))) == 1
        assert item.images[0] in was.images
