"""The shipped model: small, complete, loaded by plain transformers, and right about its world."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from foveate import glimpse
from foveate.evaluation import answer, prepare, score

DEMO = Path(__file__).parents[1] / "examples" / "demo.png"


@pytest.fixture(scope="module")
def loaded():
    return glimpse.load()


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


@pytest.mark.parametrize("size", [(168, 168), (300, 90), (31, 500)])
def test_any_picture_becomes_144_tokens(loaded, size):
    model, processor = loaded
    (batch,) = prepare(processor, [Image.new("RGB", size)], ["What is in the picture?"])
    assert (batch.inputs["input_ids"] == model.config.image_token_id).sum() == 144
    assert batch.inputs["pixel_values"].shape == (1, 3, 168, 168)


def test_it_answers_heldout_questions(loaded):
    questions = glimpse.heldout(72)
    said = answer(*loaded, [item.image for item in questions], [item.question for item in questions], batch_size=24)
    assert score(said, questions)["all"] >= 0.9


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
