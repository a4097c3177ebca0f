"""Training a method's own weights: few steps, stopped and gone on with, on glimpse's lessons and on a user's folder."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

import plugin
import quecc
import vistog
from lessons import IGNORE
from model import make_model, make_processor

import foveate
from foveate import glimpse
from foveate.asking.mistake import Mistake
from foveate.evaluation.runner import model_inputs
from foveate.methods.trained import WEIGHTS_NAME, Plugin

DEMO = Path(__file__).parents[2] / "examples"


def options(folder: Path, *more: str):
    few = ["--out", str(folder), "--steps", "4", "--batch", "2", "--warmup", "1", "--decay", "2", "--log-every", "1"]
    return vistog.parse([*few, *more])


@pytest.fixture(scope="module")
def random_model(tmp_path_factory) -> Path:
    """A LLaVA that nobody trained, with a processor of its own, as a folder."""
    folder, processor = tmp_path_factory.mktemp("model"), make_processor("small")
    torch.manual_seed(0)
    make_model(processor, "small").save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return Plugin.read(folder / WEIGHTS_NAME).tensors(torch.device("cpu"))


@pytest.mark.parametrize("choice", [(), ("--grouping", "soft"), ("--keep", "6", "--carriers", "first")])
def test_few_steps_on_glimpse_write_weights_that_answer(tmp_path, choice):
    log = vistog.train(options(tmp_path, *choice))
    assert [entry["step"] for entry in log] == [1, 2, 3, 4] and all(entry["loss"] > 0 for entry in log)
    header = Plugin.read(tmp_path / WEIGHTS_NAME)
    model, processor = glimpse.load()
    method = foveate.VisToG(weights=tmp_path, **header.options)
    (question,) = glimpse.heldout(1)
    with foveate.prune(model, method) as pruned:
        model.generate(**model_inputs(processor, [question.images], [question.question]), max_new_tokens=1)
    assert pruned.report.images == [[(144, header.options["keep"])]]
    before = weights_in(tmp_path)
    assert all((tensor != 0).any() for name, tensor in before.items() if name.endswith("bias")), "each weight learns"


def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch):
    vistog.train(options(tmp_path / "whole"))
    loss, steps = vistog.Packed.loss, []

    def interrupted(self, batch):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return loss(self, batch)

    monkeypatch.setattr(vistog.Packed, "loss", interrupted)
    with pytest.raises(SystemExit):
        vistog.train(options(tmp_path / "stopped"))
    log = vistog.train(options(tmp_path / "stopped", "--resume"))
    assert [entry["step"] for entry in log] == [1, 2, 3, 4] and len(steps) == 5
    whole, stopped = weights_in(tmp_path / "whole"), weights_in(tmp_path / "stopped")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_the_llm_may_be_trained_along_as_a_model_of_its_own(tmp_path):
    vistog.train(options(tmp_path / "alone"))
    start = ("--begin-with", str(tmp_path / "alone"), "--steps", "2")
    vistog.train(options(tmp_path / "both", "--joint", *start))
    folder = tmp_path / "both" / "model"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    (question,) = glimpse.heldout(1)
    inputs = model_inputs(AutoProcessor.from_pretrained(folder), [question.images], [question.question])
    with foveate.prune(model, foveate.VisToG(weights=folder)):
        model.generate(**inputs, max_new_tokens=1)
    with pytest.raises(foveate.UnsupportedError, match="another model"):
        foveate.prune(glimpse.load()[0], foveate.VisToG(weights=folder))
    new, old = model.state_dict(), glimpse.load()[0].state_dict()
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    assert changed and not [name for name in changed if "vision_tower" in name or "projector" in name]
    with pytest.raises(Mistake, match="with or without --joint"):
        vistog.train(options(tmp_path / "both", "--resume", *start))


def test_a_checkpoint_is_neither_overwritten_nor_mistaken(tmp_path):
    vistog.train(options(tmp_path))
    with pytest.raises(Mistake, match="is there already: add --resume"):
        vistog.train(options(tmp_path))
    with pytest.raises(Mistake, match="name another --out"):
        vistog.train(options(tmp_path, "--resume", "--keep", "6"))


def test_another_model_learns_from_a_folder(tmp_path, random_model):
    log = vistog.train(options(tmp_path, "--model", str(random_model), "--data", str(DEMO), "--keep", "6"))
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    model, _ = plugin.load(options(tmp_path, "--model", str(random_model), "--data", str(DEMO)))
    foveate.prune(model, foveate.VisToG(keep=6, weights=tmp_path)).remove()
    with pytest.raises(foveate.UnsupportedError, match="trained on another model"):
        foveate.prune(glimpse.load()[0], foveate.VisToG(keep=6, weights=tmp_path))


@pytest.mark.parametrize("train", [vistog, quecc])
def test_a_model_that_joins_several_layers_of_its_encoder_learns_too(tmp_path, train):
    processor = make_processor("small")
    config = make_model(processor, "small").config
    config.vision_feature_layer = [-4, -2]
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    few = ["--out", str(tmp_path / "out"), "--steps", "2", "--batch", "2", "--warmup", "1", "--decay", "1"]
    asked = train.parse([*few, "--model", str(tmp_path / "model"), "--data", str(DEMO), "--keep", "4"])
    assert all(entry["loss"] > 0 for entry in train.train(asked))
    model, processor = plugin.load(asked)
    method = foveate.get_method(train.__name__, keep=4, weights=tmp_path / "out")
    (question,) = glimpse.heldout(1)
    with foveate.prune(model, method) as pruned:
        model.generate(**model_inputs(processor, [question.images], [question.question]), max_new_tokens=1)
    assert pruned.report.images == [[(144, 4)]]


def test_only_answers_are_learned_and_prompts_are_those_of_a_chat():
    model, processor = glimpse.load()
    talks = plugin.Talks(processor, DEMO, batch=4, seed=0)
    items = sorted(talks.items, key=lambda item: len(item.question))[:: max(1, len(talks.items) // 3)]
    batch = plugin.encode(processor, items)
    prompts = model_inputs(processor, [item.pictures() for item in items], [item.question for item in items])
    front = prompts["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :front], prompts["input_ids"])
    assert torch.equal(batch["attention_mask"][:, :front], prompts["attention_mask"])
    assert torch.equal(batch["pixel_values"], prompts["pixel_values"])
    assert (batch["labels"][:, :front] == IGNORE).all()
    for labels, item in zip(batch["labels"], items, strict=True):
        told = labels[labels != IGNORE]
        assert told[-1] == processor.tokenizer.eos_token_id
        assert processor.decode(told, skip_special_tokens=True).strip() == item.answers[0]
    with torch.no_grad():
        assert plugin.answer_loss(model, batch)["loss"] == pytest.approx(float(model(**batch).loss), abs=1e-4)


def test_every_question_comes_once_before_any_comes_again():
    talks = plugin.Talks(make_processor(), DEMO, batch=1, seed=3)
    count = len(talks.items)
    numbers = [talks._item(number).line for number in range(2 * count)]
    assert sorted(numbers[:count]) == sorted(numbers[count:]) == sorted(item.line for item in talks.items)
    assert numbers[:count] != numbers[count:]


def test_what_cannot_be_learned_from_is_refused(tmp_path, random_model):
    with pytest.raises(Mistake, match="needs --data"):
        vistog.train(options(tmp_path, "--model", str(random_model)))
    with pytest.raises(Mistake, match="cannot read"):
        vistog.train(options(tmp_path, "--data", str(tmp_path)))
    shutil.copy(DEMO / "demo.png", tmp_path)
    rows = [{"image": "demo.png", "question": "Is it?", "answer": "yes", "before": "What is it?"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(Mistake, match="no question that stands alone"):
        vistog.train(options(tmp_path, "--data", str(tmp_path)))
    assert not (tmp_path / WEIGHTS_NAME).exists()


@pytest.mark.parametrize("script", ["attention_predictor", "quecc", "videollm_mod", "vistog"])
def test_a_mistake_of_the_user_is_one_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--out", str(tmp_path / "out"), "--model", "some/model"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(Path(plugin.__file__).with_name(f"{script}.py")), run_name="__main__")
    told = capsys.readouterr().err or str(stopped.value)
    assert "some/model needs --data" in told and told.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()
