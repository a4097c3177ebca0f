"""The model for VLMEvalKit, behind a stand-in for its base class: the package itself is on no package index."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

import foveate
from foveate import glimpse


@pytest.fixture
def model_class(monkeypatch):
    base = ModuleType("vlmeval.vlm.base")

    class BaseModel:
        INTERLEAVE = False

        def generate(self, message, dataset=None):
            return self.generate_inner(message, dataset)

    base.BaseModel = BaseModel
    for name in ("vlmeval", "vlmeval.vlm"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", base)
    monkeypatch.delitem(sys.modules, "foveate.integrations.vlmevalkit", raising=False)
    from foveate.integrations.vlmevalkit import Foveate

    yield Foveate
    sys.modules.pop("foveate.integrations.vlmevalkit", None)


def test_it_answers_interleaved_messages(model_class, tmp_path):
    model = model_class(str(glimpse.PATH), method="plphp", keep=0.5, max_new_tokens=16)
    right = 0
    for item in glimpse.heldout(12):
        path = tmp_path / "picture.png"
        item.image.save(path)
        message = [{"type": "image", "value": str(path)}, {"type": "text", "value": item.question}]
        right += model.generate(message) == item.answer
    assert right >= 9
    assert model.pruned.report.kv_bytes < model.pruned.report.kv_bytes_unpruned


def test_mistakes_are_named_before_the_model_is_loaded(model_class):
    with pytest.raises(ValueError, match="unknown method"):
        model_class("nowhere", method="nonsense")
    with pytest.raises(ValueError, match="no method"):
        model_class("nowhere", keep=0.5)
    with pytest.raises(foveate.UnsupportedError, match="methods that fit"):
        model_class(str(glimpse.PATH), method="trimmed_llama")
