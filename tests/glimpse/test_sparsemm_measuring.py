"""Measuring visual heads: where things lie, what counts as a look, and files of scores."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

import plugin
import sparsemm as measuring
from model import make_model, make_processor

import foveate
from foveate import glimpse
from foveate.asking.mistake import Mistake
from foveate.glimpse.scene import place
from foveate.methods.trained import shipped

DEMO = Path(__file__).parents[2] / "examples"


def test_boxes_lie_where_answers_say():
    for shown in measuring.drawn(36):
        assert "".join(piece for piece, _ in shown.pieces) == shown.item.answers[0]
        for piece, box in shown.pieces:
            if box is None or shown.item.type not in ("where", "describe"):
                continue
            left, top, right, bottom = box
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
            where = place(int((top + bottom) / 2 * 3) * 3 + int((left + right) / 2 * 3))
            assert piece.endswith((where, where.split()[0])), "a line of print has the whole row"
    assert {shown.item.type for shown in measuring.drawn(6)} == set(measuring.KINDS)


@torch.no_grad()
def test_scores_are_those_of_the_untouched_models_maps():
    """Row by row, head by head: is the token that gets most inside the box of what comes next?"""
    model, processor = glimpse.load(attn_implementation="eager")
    shown = measuring.drawn(6)
    found = torch.zeros(6, 6)
    for one in shown:
        batch = plugin.encode(processor, [one.item])
        labels, image = batch.pop("labels")[0], batch["input_ids"][0] == model.config.image_token_id
        first = int(image.int().argmax())
        maps = model(**batch, output_attentions=True).attentions
        written, told = int((labels != -100).int().argmax()), ""
        for piece, box in one.pieces:
            begin = len(processor.tokenizer(told, add_special_tokens=False)["input_ids"])
            told += piece
            end = len(processor.tokenizer(told, add_special_tokens=False)["input_ids"])
            if box is None:
                continue
            left, top, right, bottom = box
            centers = {r * 12 + c: ((c + 0.5) / 12, (r + 0.5) / 12) for r in range(12) for c in range(12)}
            inside = {n for n, (x, y) in centers.items() if left <= x <= right and top <= y <= bottom}
            for row in range(written + begin - 1, written + end - 1):
                for layer in range(6):
                    for head in range(6):
                        key = int(maps[layer][0, head, row].argmax())
                        found[layer, head] += (key - first in inside) / len(inside)
    scores = measuring.visual_heads(model, processor, shown, batch=4)
    assert found.sum() > 0
    torch.testing.assert_close(scores, found / found.sum())


def test_the_shipped_scores_are_glimpses():
    model, _ = glimpse.load()
    (plugin_,) = shipped("sparsemm")
    scores = plugin_.tensors(torch.device("cpu"))["heads"]
    assert scores.shape == (6, 6) and (scores >= 0).all() and float(scores.sum()) == pytest.approx(1, abs=0.01)
    with foveate.prune(model, "sparsemm", keep=0.5):
        pass
    with pytest.raises(foveate.UnsupportedError, match=r"training/sparsemm\.py"):
        foveate.prune(glimpse.load("small")[0], "sparsemm", keep=0.5)


def test_another_model_is_measured_on_pictures_with_boxes(tmp_path, capsys):
    folder, processor = tmp_path / "model", make_processor("small")
    torch.manual_seed(0)
    make_model(processor, "small").save_pretrained(folder)
    processor.save_pretrained(folder)
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(DEMO / "demo.png", data)
    row = {"image": "demo.png", "question": "What word is printed?", "answers": ["stop"]}
    options = ["--out", str(tmp_path / "out"), "--model", str(folder), "--data", str(data)]

    (data / "data.jsonl").write_text(json.dumps(row))
    with pytest.raises(Mistake, match=r'no row with a box.*"box": \[0.1, 0.2, 0.4, 0.3\]'):
        measuring.measure(measuring.parse(options))
    rows = [row, row | {"box": [0, 0, 1]}, row | {"box": [0, 0, 1, 1]}]
    (data / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scores = measuring.measure(measuring.parse(options))
    assert scores.ndim == 2 and float(scores.sum()) == pytest.approx(1)
    assert "line 2 is left out" in capsys.readouterr().out
    model, _ = plugin.load(measuring.parse(options))
    foveate.prune(model, "sparsemm", weights=tmp_path / "out").remove()
    with pytest.raises(foveate.UnsupportedError, match="another model"):
        foveate.prune(glimpse.load()[0], "sparsemm", weights=tmp_path / "out")
