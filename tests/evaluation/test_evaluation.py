"""Scores on answers that are known."""

import pytest
from PIL import Image

from foveate.evaluation import blind, exact_match, interval, majority, prepare, score
from foveate.glimpse import Question


def ask(kind, answer, colour="red"):
    return Question((Image.new("RGB", (8, 8), colour),), f"{kind}?", answer, kind)


QUESTIONS = [ask("where", "top left"), ask("count", "2"), ask("where", "top left", "blue"), ask("count", "3")]


@pytest.mark.parametrize(
    ("prediction", "hit"), [("top left", True), (" Top  Left. ", True), ("left top", False), ("", False)]
)
def test_exact_match(prediction, hit):
    assert exact_match(prediction, "top left") is hit


def test_exact_match_of_lists_ignores_the_space_before_a_comma():
    assert exact_match("dog top left , cat top right", "dog top left, cat top right")


def test_score_by_kind():
    assert score(["top left", "2", "top right", "2"], QUESTIONS) == {"where": 0.5, "count": 0.5, "all": 0.5}


def test_majority_knows_the_most_frequent_answer():
    assert score(majority(QUESTIONS), QUESTIONS) == {"where": 1.0, "count": 0.5, "all": 0.75}


def test_blind_shows_another_picture_of_the_same_kind():
    pictures = blind(QUESTIONS)
    assert pictures[0] is QUESTIONS[2].images and pictures[2] is QUESTIONS[0].images
    assert pictures[1] is QUESTIONS[3].images


def test_interval_holds_the_mean_and_narrows():
    wide, narrow = interval([True, False] * 10), interval([True, False] * 1000)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]
    assert interval([True] * 5) == (1.0, 1.0)


def test_prepare_wants_a_picture_for_each_question():
    with pytest.raises(ValueError, match="one image for each question"):
        prepare(None, [], ["what?"])
