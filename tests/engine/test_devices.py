"""Models split over several devices, as `device_map` loads them: the same tokens and the same report as on one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pretend
import pytest
import tiny
import torch
from test_device import ROWS, method

import foveate
from foveate.engine.target import Target
from foveate.families import get_family

accelerate = pytest.importorskip("accelerate")


def split(model: Any, away: Iterable[int] = (2, 3), vision: str = "cpu") -> Any:
    """A model on the CPU, some layers of its decoder elsewhere; what stands behind the last layer is where that is.

    vision: where the encoder and the projector are.
    """
    family = get_family(model.config)
    assert family is not None
    base = family.base(model)
    target = Target(model, family, base, family.decoder(base))
    names = {module: name for name, module in model.named_modules()}
    places = {names[module]: vision for module in base.children() if module is not target.decoder}
    places |= {f"{names[base]}.{name}": "cpu" for name, _ in base.named_parameters(recurse=False)}
    places |= {names[module]: "cpu" for module in target.decoder.children() if module is not target.decoder.layers}
    for index, layer in enumerate(target.decoder.layers):
        places[names[layer]] = str(pretend.DEVICE) if index in away else "cpu"
    places[names[target.norm]] = places[names[model.get_output_embeddings()]] = places[names[layer]]
    # With the hooks that `from_pretrained(device_map=...)` makes.
    return accelerate.dispatch_model(model, places, main_device="cpu", skip_keys=tiny.CACHE)


def run(model: Any, acting: foveate.Method, batch: dict, **kwargs: Any) -> tuple[list[list[int]], Any]:
    """The tokens of an answer, and the report."""
    kwargs = dict(max_new_tokens=6, do_sample=False) | kwargs
    with foveate.prune(model, acting, record=True) as pruned:
        return model.generate(**batch, **kwargs).tolist(), pruned.report


def same(one: Any, other: Any) -> None:
    """Whether two reports say the same, the masks all on the CPU where the prompt was."""
    assert one.to_dict() == other.to_dict()
    for a, b in zip(one.layers, other.layers, strict=True):
        for name in ("kept", "seen", "taken"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None)
            if x is not None:
                assert y.device.type == "cpu" and torch.equal(x, y)
    if one.decoding is not None:
        for step, there in zip(one.decoding.chosen, other.decoding.chosen, strict=True):
            assert all(there[layer].device.type == "cpu" and torch.equal(x, there[layer]) for layer, x in step.items())


def check(family: str, name: str, batch: str, *, away: Iterable[int] = (2, 3), vision: str = "cpu", **kw: Any) -> None:
    inputs = tiny.inputs(family, **tiny.BATCHES[batch])
    tokens, report = run(tiny.build(family), method(family, name), inputs, **kw)
    with pretend.Device():
        model = split(tiny.build(family), away, vision)
        found, there = run(model, method(family, name), inputs, **kw)
        assert found == tokens
        same(report, there)


@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.parametrize(("family", "name"), ROWS)
def test_every_method_works_on_a_split_model(family, name, batch):
    check(family, name, batch)
