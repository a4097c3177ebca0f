"""The shipped model: small, complete, loaded by plain transformers, and right about its world."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MllamaForConditionalGeneration,
    MllamaProcessor,
)

import foveate
from foveate import glimpse
from foveate.evaluation import answer, blind, generate, majority, prepare, score
from foveate.evaluation.questions import from_glimpse
from foveate.evaluation.runner import Batches

DEMO = Path(__file__).parents[2] / "examples" / "demo.png"


@pytest.fixture(scope="module")
def loaded():
    return glimpse.load()


@pytest.fixture(scope="module")
def cross():
    return glimpse.load("cross")


def say(model, processor, items):
    return generate(model, processor, Batches(processor, items, 24))


def test_it_is_a_small_plain_llava(loaded):
    model, processor = loaded
    assert type(model) is LlavaForConditionalGeneration and type(processor) is LlavaProcessor
    assert sum(file.stat().st_size for file in glimpse.PATH.iterdir()) < 15e6
    assert 4e6 < sum(parameter.numel() for parameter in model.parameters()) < 7e6
    assert not model.training and model.dtype == torch.float32
    config = model.config
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.text_config.num_key_value_heads < config.text_config.num_attention_heads
    assert glimpse.load(dtype="bfloat16")[0].dtype == torch.bfloat16


@pytest.fixture(scope="module")
def small():
    return glimpse.load("small")


def test_the_small_one_is_a_quarter_and_reads_the_same_tokens(loaded, small):
    (model, processor), (guide, same) = loaded, small
    assert type(guide) is LlavaForConditionalGeneration and not guide.training and guide.dtype == torch.float32
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, guide)]
    assert sizes[0] / 5 < sizes[1] < sizes[0] / 3
    assert sum(file.stat().st_size for file in glimpse.SMALL_PATH.iterdir()) < 4e6
    assert same.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert guide.config.image_token_id == model.config.image_token_id
    assert guide.config.image_seq_length == model.config.image_seq_length == 144
    assert guide.config.text_config.num_hidden_layers == model.config.text_config.num_hidden_layers
    assert glimpse.load("small", dtype="bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("size", "kinds"), [("small", glimpse.KINDS), ("cross", glimpse.ONE_PICTURE)])
def test_the_others_answer_from_the_picture(size, kinds, request):
    loaded = request.getfixturevalue(size)
    questions, items = glimpse.heldout(96, kinds=kinds), from_glimpse(96, kinds)
    said = say(*loaded, items)
    guessed = say(*loaded, [replace(i, images=other) for i, other in zip(items, blind(questions), strict=True)])
    right = score(said, questions)["all"]
    assert right >= 0.9
    assert right >= 0.5 + max(score(guessed, questions)["all"], score(majority(questions), questions)["all"])


def test_the_tiny_one_is_a_quarter_of_that_and_knows_much_of_the_world(small):
    tiny, processor = glimpse.load("tiny")
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (small[0], tiny)]
    assert sizes[1] < sizes[0] / 2.5 and tiny.config.text_config.num_hidden_layers == 6
    said = say(tiny, processor, from_glimpse(48, ("where", "exists", "word")))
    assert score(said, glimpse.heldout(48, kinds=("where", "exists", "word")))["all"] >= 0.7


def test_the_one_with_cross_attention_is_a_plain_mllama(cross):
    model, processor = cross
    assert type(model) is MllamaForConditionalGeneration and type(processor) is MllamaProcessor
    assert sum(file.stat().st_size for file in glimpse.CROSS_PATH.iterdir()) < 8e6
    assert foveate.get_family(model.config).places == {"cross"}
    batch = prepare(processor, [Image.new("RGB", (300, 90))], ["What is in the picture?"])[0]
    assert batch.inputs["pixel_values"].shape == (1, 1, 1, 3, 168, 168)
    with foveate.prune(model, "trimmed_llama", keep=0.1) as pruned:
        model.generate(**batch.inputs, max_new_tokens=2)
        ((tokens, kept),) = pruned.report.images[0]
    assert tokens == 145 and 14 <= kept < 145


def test_other_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match="'large': there are glimpse, small, tiny, cross, video"):
        glimpse.load("large")


@pytest.mark.parametrize("size", [(168, 168), (300, 90), (31, 500)])
def test_any_picture_becomes_144_tokens(loaded, size):
    model, processor = loaded
    (batch,) = prepare(processor, [Image.new("RGB", size)], ["What is in the picture?"])
    assert (batch.inputs["input_ids"] == model.config.image_token_id).sum() == 144
    assert batch.inputs["pixel_values"].shape == (1, 3, 168, 168)


def test_it_answers_heldout_questions(loaded):
    said = say(*loaded, from_glimpse(96))
    assert score(said, glimpse.heldout(96))["all"] >= 0.9


def test_batches_say_what_single_questions_say(loaded):
    questions = glimpse.heldout(9)
    images, asked = [item.image for item in questions], [item.question for item in questions]
    assert answer(*loaded, images, asked, batch_size=9) == answer(*loaded, images, asked, batch_size=1)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Where is the owl?", "bottom left"),
        ("What is at the top right?", "sunflower"),
        ("Is there a dog?", "yes"),
        ("How many things are there?", "6"),
        ("What colour is the circle?", "red"),
        ("What word is printed?", "park"),
        (
            "What is in the picture?",
            "dog top left, sunflower top right, word park middle left, red circle middle center, "
            "owl bottom left, bicycle bottom right",
        ),
    ],
)
def test_it_understands_the_demo(loaded, question, expected):
    (said,) = answer(*loaded, [Image.open(DEMO)], [question])
    assert said == expected
