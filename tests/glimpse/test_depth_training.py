"""Training VideoLLM-MoD: the lessons are what the engine runs, and few steps write what the engine takes."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

import videollm_mod
from lessons import IGNORE
from model import make_model, make_processor
from pupils import normal
from transformers import AutoModelForImageTextToText
from videollm_mod import ROUTERS, Packed, Relaxed, parse, train

import foveate
from foveate.asking.mistake import Mistake
from foveate.engine.support import find_target
from foveate.evaluation.questions import Item
from foveate.methods.trained import WEIGHTS_NAME, Plugin
from foveate.methods.videollm_mod import VideoLLMMoD


def untaught(size: str):
    """A model that nobody trained, whose weights are large enough to matter, and its processor."""
    processor = make_processor(size)
    torch.manual_seed(0)
    model = make_model(processor, size)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval(), processor


@pytest.fixture
def own(monkeypatch):
    """Commands get a model that nobody trained in place of the one that the package brings."""
    monkeypatch.setattr(videollm_mod.plugin, "load", lambda options, lessons: frozen())


def frozen():
    model, processor = untaught("video")
    return model.requires_grad_(False), processor


def few(folder: Path, *more: str):
    return parse(["--out", str(folder), "--steps", "4", "--batch", "8", "--warmup", "1", "--log-every", "1", *more])


def lesson(packed: Packed, frames: int) -> dict[str, torch.Tensor]:
    """A lesson in which nothing is asked before all frames were seen."""
    lessons = (packed.lessons[number, frames] for number in range(100))
    found = next(each for each in lessons if (each["labels"][each["turn"] == 0] == IGNORE).all())
    return {name: value[None] for name, value in found.items()}


@pytest.mark.parametrize("size", ["glimpse", "video"])
@pytest.mark.parametrize("router", ["learned", "uniform", "random", "exit"])
@torch.no_grad()
def test_the_loss_of_a_lesson_is_that_of_its_chats_in_the_engine(size, router):
    model, processor = untaught(size)
    packed = Packed(model, processor, router)
    own = VideoLLMMoD(keep=0.25, router="random" if router == "exit" else router, seed=3)
    first = own.initial(find_target(model).host)
    method = own.holding({name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in first.items()})
    batch = lesson(packed, 4 if size == "video" else 2)
    found = packed.loss(method, batch)["loss"]
    model.set_attn_implementation("sdpa")
    whole = packed.whole(batch)
    ids, labels, turn = (whole[name][0] for name in ("ids", "labels", "turn"))
    # Its draw is that of the first layer behind which tokens are gone.
    engine = foveate.RandomLayer(keep=0.25, layer=1, seed=3 * 1009 + 1) if router == "exit" else method
    losses, counts = [], []
    with foveate.prune(model, engine):
        for number in range(1, int(turn.max()) + 1):
            chat = (turn == 0) | (turn == number)
            inputs = {"input_ids": ids[chat][None], "pixel_values": normal(batch["pixels"][0])}
            losses.append(model(**inputs, labels=labels[chat][None]).loss)
            counts.append((labels[chat] != IGNORE).sum())
    weights = torch.stack(counts).float()
    plain = (torch.stack(losses) * weights).sum() / weights.sum()
    torch.testing.assert_close(found, plain, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("size", ["glimpse", "video"])
@torch.no_grad()
def test_what_is_learned_from_becomes_the_choice_itself(size):
    """In lessons, and in the engine, where shorter prompts are padded."""
    model, processor = untaught(size)
    packed, target = Packed(model, processor, "learned"), find_target(model)
    first = VideoLLMMoD().initial(target.host)
    tensors = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in first.items()}
    relaxed, method = Relaxed().holding(tensors), VideoLLMMoD().holding(tensors)
    batch = lesson(packed, 4 if size == "video" else 2)
    pictures = [Image.new("RGB", (40, 40), (90 * n, 90, 90)) for n in range(3)]
    items = [Item(tuple(pictures), "What is in the pictures?", ("no",)), Item((pictures[0],), "What?", ("no",))]
    talks = videollm_mod.plugin.encode(processor, items)
    losses = []
    for tau, held in ((1.0, relaxed), (1e-6, relaxed), (0.0, method)):
        relaxed.tau = tau
        with relaxed.looking(target.decoder.layers) if held is relaxed else nullcontext():
            own = packed.loss(held, batch)["loss"]
            model.set_attn_implementation("sdpa")
            with foveate.prune(model, held):
                losses.append((own, videollm_mod.plugin.answer_loss(model, talks)["loss"]))
    soft, hard, itself = torch.tensor(losses)
    torch.testing.assert_close(hard, itself, atol=1e-2, rtol=1e-2)
    assert ((soft - itself).abs() > (hard - itself).abs()).all()


def test_few_steps_write_routers_that_the_model_takes(own, tmp_path):
    log = train(few(tmp_path))
    assert [entry["step"] for entry in log] == [1, 2, 3, 4] and all(entry["loss"] > 0 for entry in log)
    with foveate.prune(untaught("video")[0], VideoLLMMoD(weights=tmp_path)) as pruned:
        tensors = pruned.methods[0].tensors
    assert sorted(tensors) == [f"{layer}.{part}" for layer in (1, 3, 5) for part in ("bias", "weight")]
    assert all((tensor != 0).any() for tensor in tensors.values()), "each weight learns"


def test_a_training_that_was_stopped_ends_as_one_that_was_not(own, tmp_path, monkeypatch):
    train(few(tmp_path / "whole"))
    loss, steps = Packed.loss, []

    def interrupted(self, method, batch):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return loss(self, method, batch)

    monkeypatch.setattr(Packed, "loss", interrupted)
    with pytest.raises(SystemExit):
        train(few(tmp_path / "stopped"))
    train(few(tmp_path / "stopped", "--resume"))
    whole, stopped = (
        Plugin.read(tmp_path / n / WEIGHTS_NAME).tensors(torch.device("cpu")) for n in ("whole", "stopped")
    )
    assert len(steps) == 5 and all(torch.equal(whole[name], stopped[name]) for name in whole)


@pytest.mark.parametrize("router", ROUTERS)
def test_joint_training_writes_a_model_and_what_belongs_to_it(own, tmp_path, router):
    train(few(tmp_path, "--joint", "--router", router, "--rate", "1"))  # so few steps change little at a lower one
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    before, _ = untaught("video")
    changed = {
        name.split(".")[1]
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before.get_parameter(name))
    }
    assert changed == {"language_model"}, "the vision encoder stays as it is"
    assert (tmp_path / "model" / WEIGHTS_NAME).exists() == (router == "learned")
    if router == "learned":
        foveate.prune(model, VideoLLMMoD(weights=tmp_path / "model")).remove()
        with pytest.raises(foveate.UnsupportedError, match="trained on another model"):
            foveate.prune(before, VideoLLMMoD(weights=tmp_path / "model"))


@pytest.mark.parametrize("joint", [[], ["--joint"]])
def test_another_model_learns_from_a_folder_of_clips(tmp_path, joint):
    model, processor = untaught("small")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    data = tmp_path / "data"
    data.mkdir()
    for name in "abc":
        Image.new("RGB", (40, 40), (80 * "abc".index(name), 90, 90)).save(data / f"{name}.png")
    rows = [
        {"images": ["a.png", "b.png", "c.png"], "question": "what is in the pictures?", "answers": ["nothing"]},
        {"image": "b.png", "question": "is there a dog?", "answer": "no"},
    ]
    (data / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    there = ["--model", str(tmp_path / "base"), "--data", str(data), "--batch", "2", "--layers", "1,2"]
    log = train(few(tmp_path / "out", *there, *joint))
    assert len(log) == 4
    written = tmp_path / "out" / "model" if joint else tmp_path / "out"
    model = AutoModelForImageTextToText.from_pretrained(written if joint else tmp_path / "base")
    with foveate.prune(model, VideoLLMMoD(layers=(1, 2), weights=written)) as pruned:
        assert pruned.methods[0].tensors["1.weight"].shape == (96,)


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(Mistake, match="train the model with it, --joint"):
        train(few(tmp_path, "--router", "random"))
    with pytest.raises(Mistake, match="leave --data out"):
        train(few(tmp_path, "--joint", "--router", "exit", "--data", str(tmp_path)))
    with pytest.raises(Mistake, match="needs --data"):
        train(few(tmp_path, "--model", "somebody/something"))
    assert not (tmp_path / WEIGHTS_NAME).exists()
