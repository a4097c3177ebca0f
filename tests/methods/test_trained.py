"""Weights of a method's own: they fit one model, and what does not fit is refused before anything changes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

import foveate
from foveate.engine.support import find_target
from foveate.engine.target import fingerprint
from foveate.methods import trained
from foveate.methods.base import EncoderMethod
from foveate.methods.budgets import topk_mask
from foveate.methods.tokens import EncoderTokens
from foveate.methods.trained import WEIGHTS_NAME, Plugin, TrainedMethod, write_plugin


@dataclass
class Scored(TrainedMethod, EncoderMethod):
    """Keeps the tokens with the highest score of its own weights."""

    summary, source, name = "a test", "a test", "scored"
    fixed = ("keep",)
    keep: float | int = 4

    def initial(self, host):
        return {"scores": torch.arange(64.0, device=host.device)[None]}

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        scores = self.tensors["scores"][0, : tokens.grid[0] * tokens.grid[1]]
        return topk_mask(scores.expand(tokens.tiles, -1), budget)


def written(folder: Path, model, **options) -> Path:
    path = folder / WEIGHTS_NAME
    scores = torch.arange(64.0)[None]
    write_plugin(path, Scored(**options), "llava", fingerprint(model.model), {"scores": scores})
    return path


def test_a_method_chooses_by_its_weights(tmp_path):
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    path = written(tmp_path, model)
    for weights in (path, str(path), tmp_path):
        with foveate.prune(model, Scored(weights=weights), record=True) as pruned:
            model.generate(**batch, max_new_tokens=2)
        kept = pruned.report.layers[0].kept[0, 0][batch["input_ids"][0] == tiny.IMAGE]
        assert kept.nonzero().flatten().tolist() == [32, 33, 34, 35]


def test_a_method_bound_to_one_model_stays_free_for_others(tmp_path):
    model = tiny.build("llava")
    method = Scored(weights=written(tmp_path, model))
    with foveate.prune(model, method) as pruned:
        assert pruned.methods[0].tensors["scores"].dtype == torch.float32
    with pytest.raises(KeyError):
        method.tensors  # noqa: B018


def test_weights_of_another_model_are_refused(tmp_path):
    model, other = tiny.build("llava"), tiny.build("llava")
    with torch.no_grad():
        next(p for p in other.model.parameters() if p.ndim > 1).neg_()
    method = Scored(weights=written(tmp_path, other))
    with pytest.raises(foveate.UnsupportedError, match=r"trained on another model .*train scored on this one"):
        foveate.prune(model, method)
    foveate.prune(model, "random").remove()  # nothing was left behind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_is_known_again_in_every_dtype(dtype):
    model = tiny.build("llava")
    whole = fingerprint(model.model)
    assert fingerprint(model.to(dtype).model) == whole


def test_weights_for_another_keep_are_refused(tmp_path):
    model = tiny.build("llava")
    path = written(tmp_path, model)
    with pytest.raises(ValueError, match="were trained with keep=4, not keep=5: say keep=4"):
        foveate.prune(model, Scored(weights=path, keep=5))


def test_weights_of_another_method_are_refused(tmp_path):
    model = tiny.build("llava")
    path = written(tmp_path, model)
    other = type("Other", (Scored,), {"name": "other"})
    with pytest.raises(ValueError, match="are of scored, not of other"):
        foveate.prune(model, other(weights=path))


def test_a_model_without_weights_is_refused():
    with pytest.raises(foveate.UnsupportedError, match=r"none for it come with the library: train them"):
        foveate.prune(tiny.build("llava"), Scored())
    foveate.prune(tiny.build("llava"), Scored(keep=1.0)).remove()  # which needs none to change nothing


def test_weights_that_come_with_the_library_are_found_by_the_model(tmp_path, monkeypatch):
    model = tiny.build("llava")
    plugin = Plugin.read(written(tmp_path, model))
    monkeypatch.setattr(trained, "shipped", lambda method: [plugin])
    foveate.prune(model, Scored()).remove()
    with pytest.raises(ValueError, match="has weights for keep=4 here, not for keep=9"):
        foveate.prune(model, Scored(keep=9))


def test_a_method_may_hold_tensors_that_are_being_trained():
    """On any model, and what they give has a gradient."""
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    scores = torch.arange(64.0).requires_grad_()
    held = Scored().holding({"scores": scores[None]})
    with foveate.prune(model, held) as pruned:
        assert pruned.methods[0] is held
        model.generate(**batch, max_new_tokens=2)
        assert pruned.methods[0].tensors["scores"].requires_grad


def test_an_untrained_method_has_weights_for_any_model():
    """Such as one of random weights, or of none at all: what it costs does not depend on them."""
    with torch.device("meta"):
        sketch = type(tiny.build("llava"))(tiny.config("llava"))
    for model in (tiny.build("llava"), sketch):
        with foveate.prune(model, Scored().untrained()) as pruned:
            assert pruned.methods[0].tensors["scores"].device == model.device
    random = foveate.get_method("random")
    assert random.untrained() is random


def test_a_method_may_copy_the_projector():
    host = find_target(tiny.build("llava")).host
    copied = host.projector()
    assert copied["linear_1.weight"].dtype == torch.float32
    model = tiny.build("llava")
    there = dict(model.model.multi_modal_projector.named_parameters())
    assert copied.keys() == there.keys() and all(torch.equal(copied[name], there[name]) for name in there)
    assert find_target(tiny.build("qwen2_5_vl")).host.projector() == {}, "its projector joins patches"


@pytest.mark.parametrize("content", [b"", b"no weights at all"])
def test_what_is_no_file_of_weights_is_refused(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot read the weights"):
        foveate.prune(tiny.build("llava"), Scored(weights=path))
    with pytest.raises(ValueError, match="cannot read the weights"):
        foveate.prune(tiny.build("llava"), Scored(weights=tmp_path / "missing"))


def test_strange_weights_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="does not say which method and model"):
        foveate.prune(tiny.build("llava"), Scored(weights=tmp_path / "a.safetensors"))


@pytest.mark.parametrize("weights", [3, "", True])
def test_weights_are_a_path(weights):
    with pytest.raises(ValueError, match="weights must be a path or None"):
        Scored(weights=weights)


def test_a_saved_method_takes_its_weights_along(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["foveate.methods"], "get_method", lambda name, **options: Scored(**options))
    model = tiny.build("llava")
    method = Scored(weights=written(tmp_path / "trained", model))
    method.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "foveate_config.json").read_text()) == {
        "method": "scored", "keep": 4, "weights": WEIGHTS_NAME
    }  # fmt: skip
    again = foveate.Method.from_pretrained(tmp_path / "saved")
    assert again.weights == str(tmp_path / "saved" / WEIGHTS_NAME)
    again.save_pretrained(tmp_path / "saved")  # over itself
    foveate.prune(model, again).remove()
    Scored().save_pretrained(tmp_path / "default")
    assert foveate.Method.from_pretrained(tmp_path / "default") == Scored()
    with pytest.raises(ValueError, match="cannot read"):
        Scored(weights=tmp_path / "missing").save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()
