"""The model that sees clips: small, complete, loaded by plain transformers, right about them, and only with time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from typer.testing import CliRunner

import foveate
from foveate import glimpse
from foveate.commands.app import app
from foveate.evaluation import answer, blind, generate, majority, prepare, score
from foveate.evaluation.questions import as_items
from foveate.evaluation.runner import Batches
from foveate.glimpse import clips, happenings
from foveate.glimpse.happenings import backwards, frozen, shuffled

FRAMES = sorted((Path(__file__).parents[2] / "examples" / "clip").iterdir())
COUNT = 96  # eight questions of each kind


@pytest.fixture(scope="module")
def loaded():
    return glimpse.load("video")


@pytest.fixture(scope="module")
def questions():
    return glimpse.heldout_clips(COUNT)


def scores(loaded, questions):
    model, processor = loaded
    return score(generate(model, processor, Batches(processor, as_items(questions), 24)), questions)


def test_it_is_a_small_plain_llava_of_six_layers(loaded):
    model, processor = loaded
    assert type(model) is LlavaForConditionalGeneration and type(processor) is LlavaProcessor
    assert sum(file.stat().st_size for file in glimpse.VIDEO_PATH.iterdir()) < 4e6
    assert model.config.text_config.num_hidden_layers == 6 and model.config.image_seq_length == clips.TOKENS == 64
    assert not model.training and model.dtype == torch.float32


def test_each_frame_is_an_image_of_64_tokens(loaded):
    model, processor = loaded
    frames = [Image.new("RGB", (300, 90))] * 5
    (batch,) = prepare(processor, [frames], ["Which way does the dog move?"])
    assert (batch.inputs["input_ids"] == model.config.image_token_id).sum() == 5 * 64
    assert batch.inputs["pixel_values"].shape == (5, 3, 112, 112)
    with foveate.prune(model, "random", keep=16) as pruned:
        model.generate(**batch.inputs, max_new_tokens=2)
        assert pruned.report.images == [[(64, 16)] * 5]


def test_it_knows_the_words_of_pictures_and_those_of_clips(loaded):
    tokenizer = loaded[1].tokenizer
    assert set(glimpse.load("small")[1].tokenizer.get_vocab()) < set(tokenizer.get_vocab())
    asked = [template.format("dog", "circle") for kind in happenings.ASK.values() for template in kind]
    said = [*clips.DIRECTIONS, "nowhere", "moves", "appears", "disappears", "turns"]
    for text in [*asked, *said, "Describe the video.", "in the last frame"]:
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids, text


def test_it_answers_heldout_questions_about_what_it_sees(loaded, questions):
    right = scores(loaded, questions)["all"]
    assert right >= 0.9
    others = [replace(q, images=images) for q, images in zip(questions, blind(questions), strict=True)]
    assert right >= 0.5 + max(scores(loaded, others)["all"], score(majority(questions), questions)["all"])


@pytest.mark.parametrize("control", [shuffled, backwards, frozen])
def test_without_time_it_knows_only_what_any_frame_shows(loaded, questions, control):
    right = scores(loaded, control(questions))
    assert all(right[kind] >= 0.75 for kind in happenings.STILL)
    # who sees only where a thing has been guesses one of two ways
    assert sum(right[kind] for kind in ("direction", "first", "at_end")) / 3 <= 0.75
    assert right["describe"] <= 0.5


@pytest.mark.parametrize("frames", clips.LENGTHS)
def test_clips_may_have_four_to_eight_frames(loaded, frames):
    assert scores(loaded, glimpse.heldout_clips(36, first=100, frames=frames))["all"] >= 0.8


def test_frames_may_come_in_turns(loaded):
    """What is asked when four of six frames have been shown, and again when all have."""
    model, processor = loaded
    asked = glimpse.heldout_clips(24, kinds=("direction", "at_end", "happens"))
    said = []
    for question in asked:
        parts, talk = (question.images[:4], question.images[4:]), []
        for part in parts:
            content = [{"type": "image", "image": image} for image in part]
            talk.append({"role": "user", "content": [*content, {"type": "text", "text": question.question}]})
            inputs = processor.apply_chat_template(
                talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            talk.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        said.append(text)
    assert score(said, asked)["all"] >= 0.8


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Which way does the dog move?", "right"),
        ("Where is the dog at the start?", "bottom left"),
        ("Where is the rocket at the end?", "top left"),
        ("What happens to the rocket?", "moves up"),
        ("What colour is the circle at the end?", "blue"),
        ("What appears?", "house"),
        ("Is there a cat?", "no"),
    ],
)
def test_it_understands_the_example(loaded, question, expected):
    assert answer(*loaded, [[Image.open(frame) for frame in FRAMES]], [question]) == [expected]


def test_the_commands_take_it_by_its_name(tmp_path, undrawn):
    def run(*args):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
        return result.output

    asked = ("Which way does the dog move?", "--model", "glimpse-video")
    assert "right" in run("ask", *FRAMES, *asked, "--method", "fastv", "--keep", 0.5, "--compare")
    options = ("--methods", "uniform", "--keep", 0.5, "--count", 12, "--out", tmp_path)
    output = run("eval", "--model", "glimpse-video", *options)
    assert "untouched" in output
    rows = (tmp_path / "rows.csv").read_text()
    assert {"accuracy:time", "accuracy:still", "accuracy:direction"} <= set(rows.splitlines()[0].split(","))
