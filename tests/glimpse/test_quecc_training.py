"""Training `quecc`: what is trained is what runs, on glimpse's lessons and on a user's folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

import quecc
from lessons import IGNORE, Lessons
from model import make_model, make_processor

import foveate
from foveate import glimpse
from foveate.engine.support import find_target
from foveate.evaluation.runner import model_inputs
from foveate.methods.quecc import QueCC
from foveate.methods.trained import WEIGHTS_NAME, Plugin

DEMO = Path(__file__).parents[2] / "examples"


def options(folder: Path, *more: str):
    few = ["--out", str(folder), "--steps", "3", "--batch", "2", "--warmup", "1", "--decay", "2", "--log-every", "1"]
    return quecc.parse([*few, *more])


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("question", ["own", "none"])
def test_what_is_trained_is_what_runs(pictures, question):
    """The loss of a lesson is the mean over its talks, each as a chat of its own under the method."""
    model, processor = glimpse.load()
    torch.manual_seed(0)
    method = QueCC(keep=4, question=question)
    held = method.holding(method.initial(find_target(model).host))
    lessons = Lessons(processor)
    example = lessons[3, pictures]
    batch = {name: value[None] for name, value in example.items()}
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in example["pixels"]]
    losses = []
    with torch.no_grad():
        at_once = quecc.Glimpse(model, processor, 99).loss(held, batch)["loss"]
        with foveate.prune(model, held):
            for turn in range(1, int(example["turn"].max()) + 1):
                own = example["turn"] == turn
                talk = processor.tokenizer.decode(example["ids"][own])
                text = "<s>USER: " + "<image>" * pictures + talk
                chat = processor(images=images, text=text, return_tensors="pt", add_special_tokens=False)
                labels = torch.full_like(chat["input_ids"], IGNORE)
                labels[0, -int(own.sum()) :] = example["labels"][own]
                losses.append(model(**chat, labels=labels).loss)
    assert len(losses) > 3
    torch.testing.assert_close(at_once, torch.stack(losses).mean(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("question", ["own", "none"])
def test_few_steps_on_glimpse_write_weights_that_answer(tmp_path, question):
    log = quecc.train(options(tmp_path, "--keep", "4", "--question", question))
    assert [entry["step"] for entry in log] == [1, 2, 3] and all(entry["loss"] > 0 for entry in log)
    model, processor = glimpse.load()
    (asked,) = glimpse.heldout(1)
    with foveate.prune(model, QueCC(keep=4, question=question, weights=tmp_path)) as pruned:
        model.generate(**model_inputs(processor, [asked.images], [asked.question]), max_new_tokens=1)
    assert pruned.report.images == [[(144, 4)]]
    learned = Plugin.read(tmp_path / WEIGHTS_NAME).tensors(torch.device("cpu"))
    still = {name for name, tensor in learned.items() if name.endswith("bias") and not tensor.any()}
    assert still == (set() if question == "own" else {"text.norm.bias"}), "what takes part learns"


def test_training_begins_where_the_llm_understands_a_part():
    """Reading what is least like the mean patch, and not the mean of a cell, which is nothing that it knows."""
    model, processor = glimpse.load()
    method, lessons = QueCC(keep=16), quecc.Glimpse(model, processor, 8)
    batch = next(lessons.batches(options(Path("unused")), 0))
    torch.manual_seed(0)
    weights = method.initial(find_target(model).host)
    with torch.no_grad():
        before = lessons.loss(method.holding(weights), batch)["loss"]
        quecc.begin([lessons.shown(method, batch)], weights)
        begun = lessons.loss(method.holding(weights), batch)["loss"]
    assert begun < before * 0.8


def test_another_model_learns_from_a_folder(tmp_path):
    processor = make_processor("small")
    torch.manual_seed(0)
    make_model(processor, "small").save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    where = ("--model", str(tmp_path / "model"), "--data", str(DEMO), "--keep", "4")
    log = quecc.train(options(tmp_path / "trained", *where))
    assert [entry["step"] for entry in log] == [1, 2, 3]
    with pytest.raises(foveate.UnsupportedError, match="trained on another model"):
        foveate.prune(glimpse.load()[0], QueCC(keep=4, weights=tmp_path / "trained"))
