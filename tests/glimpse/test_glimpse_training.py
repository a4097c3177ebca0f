"""The whole way from nothing to a model that plain transformers loads, in a few small steps."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

from lessons import GRID, IGNORE, TEXT, Lessons
from model import make_model, make_processor
from train import Pupil, parse, train


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def run(folder, *more):
    options = ["--out", str(folder), "--see-steps", "2", "--batch", "2", "--workers", "0", "--log-every", "1"]
    return train(parse([*options, *more]))


def test_few_steps_train_resume_and_load(tmp_path):
    log = run(tmp_path, "--steps", "3", "--warmup", "1", "--decay", "1")
    assert [entry["step"] for entry in log] == [1, 2, 3]
    assert "answer" not in log[1] and log[2]["answer"] > 0
    log = run(tmp_path, "--steps", "4", "--resume")
    assert [entry["step"] for entry in log] == [4], "goes on where it stopped"

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert model.config.image_token_id == AutoProcessor.from_pretrained(tmp_path / "model").image_token_id
    assert sum(file.stat().st_size for file in (tmp_path / "model").iterdir()) < 15e6


def test_an_example_trains_what_a_chat_asks(processor):
    """The answer's loss in a packed example is the loss of the same question asked alone."""
    lessons = Lessons(processor, 0, 1)
    example = lessons[0]
    pupil = Pupil(make_model(processor), lessons).eval()
    torch.manual_seed(0)
    for parameter in pupil.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = {name: value[None] for name, value in example.items()}
    second = (example["turn"] == 2).nonzero().flatten()
    only = {**batch, "labels": torch.where(batch["turn"] == 2, batch["labels"], IGNORE)}
    alone = {
        "ids": batch["ids"][:, second],
        "labels": batch["labels"][:, second],
        "turn": torch.ones_like(batch["turn"][:, second]),
    }
    with torch.no_grad():
        tokens, _ = pupil.see(batch["pixels"])
        packed, _ = pupil.answer_loss(tokens, only)
        single, _ = pupil.answer_loss(tokens, alone)
        chat = torch.cat([torch.tensor([lessons.prefix]), alone["ids"]], 1)
        labels = torch.cat([torch.full((1, len(lessons.prefix)), IGNORE), alone["labels"]], 1)
        pixels = processor.image_processor(
            images=[batch["pixels"][0].permute(1, 2, 0).numpy()], return_tensors="pt"
        ).pixel_values
        plain = pupil.model(input_ids=chat, pixel_values=pixels, labels=labels).loss
    torch.testing.assert_close(packed, single, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed, plain, atol=1e-3, rtol=1e-3)


def test_examples_have_one_shape_and_one_seed(processor):
    lessons = Lessons(processor, 5, 8)
    for index in range(3):
        example, again = lessons[index], lessons[index]
        assert all(torch.equal(example[name], again[name]) for name in example)
        assert example["ids"].shape == example["labels"].shape == example["turn"].shape == (TEXT,)
        assert example["patches"].shape == (4, GRID**2) and example["pixels"].dtype == torch.uint8
    assert not torch.equal(lessons[0]["pixels"], lessons[1]["pixels"])


def test_words_are_read_and_written_cleanly(processor):
    tokenizer = processor.tokenizer

    def words(text):
        return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

    assert words("How many foxes?") == ["how", "many", "fox", "?"]
    assert words("two houses, 407 Dogs")[1:] == ["house", ",", "4", "##0", "##7", "dog"]
    assert words("What's in the middle of an IMAGE?")[:6] == ["what", "is", "in", "the", "middle", "center"]
    assert words("the upper-left") == ["the", "top", "left"]
    text = "number 407 top left, red circle middle center"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.padding_side == "left"
