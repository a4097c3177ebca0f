"""Training the network of attention_predictor: what it learns from, and few steps of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

import attention_predictor as training
import plugin
from model import make_model, make_processor

import foveate
from foveate import glimpse
from foveate.evaluation.questions import from_glimpse
from foveate.evaluation.runner import model_inputs
from foveate.methods.attention_predictor import SHAPES, pushed
from foveate.methods.trained import WEIGHTS_NAME, Plugin

DEMO = Path(__file__).parents[2] / "examples"


def options(folder: Path, *more: str):
    few = ["--out", str(folder), "--steps", "3", "--batch", "2", "--warmup", "1", "--decay", "2", "--log-every", "1"]
    return training.parse([*few, *more])


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return Plugin.read(folder / WEIGHTS_NAME).tensors(torch.device("cpu"))


def test_few_steps_write_a_network_that_decodes(tmp_path):
    log = training.train(options(tmp_path))
    assert [entry["step"] for entry in log] == [1, 2, 3]
    for entry in log:
        assert 0 < entry["recall"] <= entry["best"] <= 1 and 0 < entry["last_step"] <= entry["best"]
    assert {name: tuple(tensor.shape) for name, tensor in weights_in(tmp_path).items()} == SHAPES
    model, processor = glimpse.load()
    (question,) = glimpse.heldout(1, kinds=("describe",))
    with foveate.prune(model, "attention_predictor", weights=tmp_path) as pruned:
        model.generate(**model_inputs(processor, [question.images], [question.question]), max_new_tokens=6)
    assert pruned.report.decoding.steps == 5


def test_a_training_that_was_stopped_goes_on(tmp_path):
    training.train(options(tmp_path / "whole"))
    training.train(options(tmp_path / "parts", "--steps", "3", "--save-every", "1"))
    whole, again = weights_in(tmp_path / "whole"), weights_in(tmp_path / "parts")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    log = training.train(options(tmp_path / "parts", "--steps", "5", "--resume"))
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5]


def test_another_model_learns_from_a_folder(tmp_path):
    folder, processor = tmp_path / "model", make_processor("small")
    torch.manual_seed(0)
    make_model(processor, "small").save_pretrained(folder)
    processor.save_pretrained(folder)
    out = tmp_path / "out"
    training.train(options(out, "--model", str(folder), "--data", str(DEMO), "--block", "4", "--history", "5"))
    model, _ = plugin.load(options(out, "--model", str(folder), "--data", str(DEMO)))
    foveate.prune(model, "attention_predictor", weights=out, block=4, history=5).remove()
    with pytest.raises(foveate.UnsupportedError, match="trained on another model"):
        foveate.prune(glimpse.load()[0], "attention_predictor", weights=out)


@torch.no_grad()
def test_histories_are_the_rows_before_and_sparse_ones_know_what_was_read():
    """Against the attention of the untouched model, row by row."""
    model, processor = glimpse.load(attn_implementation="eager")
    batch = plugin.encode(processor, from_glimpse(2, ("describe",)))
    method = training.Taught(keep=0.5, dense_layers=0, history=4, block=(1, 1))
    method = method.holding({name: torch.randn(shape) for name, shape in SHAPES.items()})
    method.answers = []
    with foveate.prune(model, method):
        model(**batch)
    out = model(**{n: t for n, t in batch.items() if n != "labels"}, output_attentions=True)
    front = int((batch["labels"] != -100).any(0).int().argmax())
    image = batch["input_ids"] == model.config.image_token_id
    answer, maps = method.answers[2], out.attentions[2].unflatten(1, (2, -1)).amax(2)
    for row in range(2):
        told = int(batch["attention_mask"][row, front:].sum())
        own = maps[row][:, :, image[row]]
        assert (answer.rows[row, :, :told] - own[:, front : front + told]).abs().max() < 1e-5
        assert (answer.history[row] - own[:, front - 4 : front]).abs().max() < 1e-5
        assert answer.told[row].tolist() == [True] * told + [False] * (answer.told.shape[1] - told)

    torch.manual_seed(1)
    history, rows, real = training.windows(answer, method.tensors, refresh=3)
    assert real.all() and len(history) == len(rows) == 2 * int(answer.told.sum())
    torch.manual_seed(1)
    sparse = int(torch.randperm(2)[0])
    steps = answer.told.sum(1).tolist()
    start = 0
    for row in range(2):
        for head in range(2):
            known = answer.history[row, head]
            for step in range(steps[row]):
                found = history[start]
                start += 1
                if row != sparse:
                    assert torch.equal(found, known)
                else:
                    assert ((found == known) | (found == 0)).all(), "a row knows what was read of it, and no more"
                    zeros = (found[-1] == 0).sum()
                    assert zeros == 0 if step % 3 == 0 else zeros >= 0.4 * found.shape[-1], "every third is whole"
                known = pushed(known, answer.rows[row, head, step][None])
