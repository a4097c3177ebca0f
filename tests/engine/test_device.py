"""On a device: nothing is mixed up with the CPU, and decoding waits for it no more often than the untouched model."""

from __future__ import annotations

from typing import Any

import cases
import pretend
import pytest
import tiny
import torch
from test_guided import guide_of

import foveate
from foveate.evaluation.attention import last_token_attention
from foveate.evaluation.proving import prove

pytestmark = pytest.mark.sampled(5)

# Beside the rows of the matrix: methods that are proven in files of their own.
OTHERS: dict[str, dict[str, Any]] = {
    "visionzip": dict(keep=0.25),
    "pooling": dict(keep=0.25),
    "zipvl": dict(keep=0.9),
    "elastic_cache": dict(keep=0.5),
    "mint": dict(keep=0.5, layer=2),
    "sgl": dict(keep=0.5, layer=2),
    "vistog": dict(keep=4),
}
ROWS = cases.FITS + [(family, name) for family in tiny.CORE_DECODERS for name in OTHERS]
ROWS.remove(("qwen2_5_vl", "vistog"))  # whose encoder takes no further tokens
# For what costs more time: one method of each place, and what acts at every step.
SOME = cases.PLACES + [("llava", name) for name in ("elastic_cache", "mint", "sgl", "vistog", "zipvl")]
TWO_RUNS = ("mint", "sgl")  # a second view, or a guide, makes steps of its own


def method(family: str, name: str, on_device: bool = False) -> foveate.Method:
    known, options = cases.METHODS.get(name) or (name, OTHERS[name])
    if known == "sgl":
        guide = guide_of(family)
        options = options | {"guide": pretend.move(guide) if on_device else guide}
    torch.manual_seed(0)  # of weights that nothing has trained
    return foveate.get_method(known, **options).untrained()


def generate(model: Any, acting: foveate.Method | None, batch: dict, **kwargs: Any) -> Any:
    kwargs = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True) | kwargs
    if acting is None:
        return model.generate(**batch, **kwargs)
    with foveate.prune(model, acting):
        return model.generate(**batch, **kwargs)


def check(family: str, name: str, batch: dict, **kwargs: Any) -> None:
    model = tiny.build(family)
    expected = generate(model, method(family, name), batch, **kwargs).sequences
    with pretend.Device():
        pretend.move(model)
        found = generate(model, method(family, name, True), pretend.moved(batch), **kwargs)
        assert all(layer.keys.device == pretend.DEVICE for layer in getattr(found, tiny.CACHE).layers)
        assert found.sequences.tolist() == expected.tolist()


@pytest.mark.parametrize(("family", "name"), ROWS)
@pytest.mark.sampled(8)
def test_every_method_works_on_a_device(family, name):
    check(family, name, tiny.inputs(family, **tiny.BATCHES["ragged"]))


@pytest.mark.parametrize(("family", "name"), cases.PLACES)
def test_beams_work_on_a_device(family, name):
    check(family, name, tiny.inputs(family, **tiny.BATCHES["ragged"]), num_beams=3)


@pytest.mark.parametrize(("family", "name"), cases.PLACES)
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_a_second_turn_works_on_a_device(family, name, image):
    model, batch = tiny.build(family), tiny.inputs(family, **tiny.BATCHES["ragged"])

    def turns(batch: dict, acting: foveate.Method) -> torch.Tensor:
        with foveate.prune(model, acting):
            first = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
            turn = tiny.next_turn(model, {k: v.cpu() for k, v in batch.items()}, first.sequences.cpu(), image)
            turn = pretend.moved(turn) if model.device == pretend.DEVICE else turn
            return model.generate(**turn, **{tiny.CACHE: getattr(first, tiny.CACHE)}, max_new_tokens=4, do_sample=False)

    expected = turns(batch, method(family, name))
    with pretend.Device():
        pretend.move(model)
        assert turns(pretend.moved(batch), method(family, name)).tolist() == expected.tolist()


def waits(model: Any, acting: foveate.Method | None, batch: dict, steps: int, **kwargs: Any) -> int:
    """How often the host waits in a `generate()` of so many steps."""
    with pretend.Device() as device:
        generate(model, acting, batch, max_new_tokens=steps, **kwargs)
        return len(device.waits)


@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.parametrize(("family", "name"), SOME)
def test_a_decoding_step_waits_no_more_than_the_untouched_models(family, name, batch):
    model = tiny.build(family)
    with pretend.Device():
        pretend.move(model)
        inputs = pretend.moved(tiny.inputs(family, **tiny.BATCHES[batch]))
        acting = method(family, name, True)
    kwargs = dict(eos_token_id=None)
    untouched = waits(model, None, inputs, 9, **kwargs) - waits(model, None, inputs, 4, **kwargs)
    pruned = waits(model, acting, inputs, 9, **kwargs) - waits(model, acting, inputs, 4, **kwargs)
    assert untouched and pruned <= untouched * (2 if name in TWO_RUNS else 1)


@pytest.mark.parametrize("batch", tiny.BATCHES)
def test_an_evicting_layer_waits_once_in_the_prefill(batch):
    model = tiny.build("llava")
    depth = len(model.model.language_model.layers)
    with pretend.Device():
        pretend.move(model)
        inputs = pretend.moved(tiny.inputs("llava", **tiny.BATCHES[batch]))
    last, every = (
        waits(model, foveate.PLPHP(keep=0.5, alpha=0.6, beta=0.3, start_layer=start), inputs, 2)
        for start in (depth - 1, 0)
    )
    assert every - last == depth - 1


def without_inference_mode(function: Any) -> Any:
    """What its decorator wraps: there, tensors cannot pretend."""
    return function.__wrapped__


def test_the_proof_runs_on_a_device():
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    expected = prove(model, batch, [method("llava", "plphp")], steps=3)
    with pretend.Device():
        pretend.move(model)
        proof = without_inference_mode(prove)(model, pretend.moved(batch), [method("llava", "plphp")], steps=3)
    assert proof.holds and expected.holds and proof.same_tokens


def test_looking_at_attention_works_on_a_device():
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    expected = last_token_attention(model, batch)
    with pretend.Device():
        pretend.move(model)
        found = without_inference_mode(last_token_attention)(model, pretend.moved(batch))
    assert found.keys() == expected.keys()
    assert all(row.device.type == "cpu" and torch.allclose(row, expected[i]) for i, row in found.items())


def test_the_pretended_device_sees_mistakes():
    with pretend.Device() as device:
        x = torch.arange(6, device=pretend.DEVICE)
        x[x > 3] = 0  # one value needs no count
        (x + 1).sum().clamp(min=2)
        assert not device.waits
        with pytest.raises(RuntimeError, match="mixes the device and the CPU"):
            x + torch.arange(6)
        for number, wait in enumerate(
            [
                lambda: bool(x.any()),
                lambda: x.tolist(),
                lambda: x.cpu(),
                lambda: x[x > 1],
                lambda: x.nonzero(),
                lambda: torch.tensor([1, 2], device=pretend.DEVICE),
                lambda: x[torch.tensor([1, 2])],
            ],
            1,
        ):
            wait()
            assert len(device.waits) == number
