"""Models split over several devices, as `device_map` loads them: the same tokens and the same report as on one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import cases
import pretend
import pytest
import tiny
import torch
from test_device import OTHERS, ROWS, method
from test_guided import guide_of

import foveate
from foveate.engine.target import Target, fingerprint
from foveate.evaluation.proving import prove
from foveate.families import get_family

accelerate = pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.sampled(8),
    pytest.mark.filterwarnings("ignore:The following device_map keys"),  # single weights, which it asks for
]

# Beside the rows of test_device.py: methods with weights of their own, and one that remembers.
OTHERS.update(videollm_mod=dict(), attention_predictor=dict(), running_sum=dict(), quecc=dict(keep=4))


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
    places[names[target.norm]] = places[names[layer]]
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    places[names[head]] = "cpu" if head.weight is embeddings.weight else places[names[layer]]
    # With the hooks that `from_pretrained(device_map=...)` makes.
    return accelerate.dispatch_model(model, places, main_device="cpu", skip_keys=tiny.CACHE)


def run(model: Any, acting: foveate.Method, batch: dict, **kwargs: Any) -> tuple[list[list[int]], Any]:
    """The tokens of an answer, and the report."""
    kwargs = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True) | kwargs
    with foveate.prune(model, acting, record=True) as pruned:
        made = model.generate(**batch, **kwargs)
    keys = [getattr(layer, "keys", None) for layer in getattr(made, tiny.CACHE).layers]
    devices = {held.device.type for held in keys if held is not None}
    assert len(devices) == (2 if hasattr(model, "hf_device_map") else 1)
    return made.sequences.tolist(), pruned.report


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
@pytest.mark.parametrize(("family", "name"), [row for row in ROWS if row[0] != "llava_next"])
def test_every_method_works_on_a_split_model(family, name, batch):
    check(family, name, batch)


@pytest.mark.parametrize(("family", "name"), cases.PLACES)
def test_beams_work_on_a_split_model(family, name):
    check(family, name, "ragged", num_beams=3)


@pytest.mark.parametrize("vision", ["cpu", str(pretend.DEVICE)])
@pytest.mark.parametrize(("family", "name"), [*cases.PLACES, ("llava", "vistog"), ("llava", "quecc")])
def test_a_forward_may_come_back_to_its_first_device(family, name, vision):
    check(family, name, "ragged", away=(1,), vision=vision)


@pytest.mark.parametrize("name", ["videollm_mod", "attention_predictor", "running_sum", "quecc"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_weights_and_memories_follow(family, name):
    check(family, name, "ragged", away=(2,))


# Windows, borrowed keys, states carried along, features added between layers: where the family has any of them.
@pytest.mark.parametrize("name", ["fastv", "plphp"])
@pytest.mark.parametrize("family", tiny.sampled(f for f in tiny.DECODER_FAMILIES if f not in tiny.CORE))
def test_every_family_can_be_split(family, name):
    if any(part == "experts" for path, _ in tiny.build(family).named_modules() for part in path.split(".")):
        pytest.skip("experts count their tokens off the CPU by a histogram that the simulated device does not have")
    check(family, name, "ragged")


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize(("family", "name"), [row for row in cases.PLACES if row[0] == "llava"])
def test_a_second_turn_works_on_a_split_model(family, name, image):
    batch = tiny.inputs(family, **tiny.BATCHES["ragged"])

    def turns(model: Any) -> list[list[int]]:
        with foveate.prune(model, method(family, name)):
            first = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
            turn = tiny.next_turn(model, batch, first.sequences, image)
            cache = {tiny.CACHE: getattr(first, tiny.CACHE)}
            return model.generate(**turn, **cache, max_new_tokens=4, do_sample=False).tolist()

    expected = turns(tiny.build(family))
    with pretend.Device():
        assert turns(split(tiny.build(family))) == expected


PROVEN = [("llava", "fopru_rank"), ("llava", "fastv"), ("qwen2_5_vl", "plphp"), ("mllama", "trimmed_llama")]


@pytest.mark.parametrize(("family", "name"), [*PROVEN, ("qwen3_5", "fopru_rank")])
def test_a_split_model_is_proven(family, name):
    """With the reference split as the model is, the one for states, too."""
    batch = tiny.inputs(family, **tiny.BATCHES["ragged"])
    with pretend.Device():
        # In inference mode the simulated device does not see what a copy between devices is made of.
        with torch.no_grad():
            found = prove.__wrapped__(split(tiny.build(family)), batch, [method(family, name)], steps=3)
        assert found.holds and not found.blind and not found.faults
        assert found.same_tokens


@pytest.mark.parametrize("threshold", [None, 0.99], ids=["guides", "may answer"])
def test_a_guide_may_be_split_itself(threshold):
    batch = tiny.inputs("llava", **tiny.BATCHES["ragged"])

    def answers(model: Any, guide: Any) -> tuple[list[list[int]], Any]:
        acting = foveate.SGL(guide=guide, keep=0.5, layer=2, exit_threshold=threshold)
        with foveate.prune(model, acting) as pruned:
            return model.generate(**batch, max_new_tokens=6, do_sample=False).tolist(), pruned.guided

    tokens, guided = answers(tiny.build("llava"), guide_of("llava"))
    with pretend.Device():
        found, there = answers(split(tiny.build("llava")), split(guide_of("llava"), (1,)))
        assert found == tokens and torch.equal(there.sequences, guided.sequences)
        assert threshold is None or torch.allclose(there.scores, guided.scores)


def test_an_offloaded_models_fingerprint_is_refused_in_words():
    model = tiny.build("llava").to("meta")
    with pytest.raises(foveate.UnsupportedError, match="offloaded"):
        fingerprint(model.model)
