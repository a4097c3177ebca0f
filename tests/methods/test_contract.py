"""Methods that break what the engine relies on are told so, by name, and the model is what it was."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch

import foveate
from foveate.methods.base import CacheMethod, EncoderMethod, LayerMethod
from foveate.methods.baselines import strided


@dataclass
class Encoder(EncoderMethod):
    """Keeps every n-th token, unless told otherwise."""

    name = "mine"
    reads = frozenset({"features"})
    keep: float = 0.25
    how: str = "well"

    def select(self, tokens, budget):
        right = strided(budget, tokens.features.shape[1])
        if self.how == "undeclared":
            return tokens.keys.norm(dim=-1) > 0
        return {
            "well": right,
            "numbers": right.float(),
            "three times": strided(3 * budget, tokens.features.shape[1]),
            "nothing": torch.zeros_like(right),
            "another shape": right[:, :-1],
            "a list": [True],
        }[self.how]


@dataclass
class Layer(LayerMethod):
    """Returns numbers."""

    name = "mine"
    keep: float = 0.25

    def stages(self, depth):
        return (1,)

    def select(self, tokens):
        return tokens.groups.present.float()


@dataclass
class Cache(CacheMethod):
    """Returns indices."""

    name = "mine"
    keep: float = 0.25

    def select(self, scores, budget):
        return scores.argsort(-1)


@pytest.fixture(scope="module")
def model():
    return tiny.build("llava")


def answer(model, method):
    inputs = tiny.inputs("llava")
    with foveate.prune(model, method):
        return model.generate(**inputs, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (Encoder(how="numbers"), "mine chooses with torch.float32 of shape .* where a tensor of torch.bool"),
        (Encoder(how="three times"), r"mine keeps \d+ of \d+ tokens and its budget is \d+: at least one must stay"),
        (Encoder(how="nothing"), "mine keeps 0 of"),
        (Encoder(how="another shape"), "mine chooses with torch.bool of shape"),
        (Encoder(how="a list"), "mine chooses with list, where"),
        (Encoder(how="undeclared"), r"mine failed \(.*NoneType.*\). It was not given .*keys.* must declare"),
        (Layer(), "mine chooses with torch.float32"),
        (Cache(), "mine chooses with torch.int64"),
    ],
)
def test_what_a_method_returns_is_checked(method, says, model):
    before = answer(model, Encoder())
    with pytest.raises(ValueError, match=says):
        answer(model, method)
    assert torch.equal(answer(model, Encoder()), before)
