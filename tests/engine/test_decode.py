"""Steps that read a part of the cache equal an untouched eager model with a mask of its own for every step."""

from __future__ import annotations

import copy
from functools import partial
from itertools import product
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from cases import TOLERANCE, image_tokens
from oracle import Hide
from sampling import pairwise
from torch import Tensor

import foveate
from foveate.engine.target import fingerprint
from foveate.methods.attention_predictor import SHAPES
from foveate.methods.base import Method
from foveate.methods.trained import write_plugin

FAR = 1e-2
OPTIONS = {
    "attention_predictor": dict(keep=0.25, history=6, dense_layers=1, refresh=4),
    "last_step": dict(keep=0.25, dense_layers=0, refresh=3),
    "running_sum": dict(keep=0.5, dense_layers=1, refresh=None),
    "pages": dict(keep=0.25, page=4, dense_layers=0),
    "per_turn": dict(keep=0.25, window=8),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture
def method_for(folder):
    return partial(method_with, folder)


def method_with(folder: Path, name: str, model, **options) -> Method:
    """A method with the options of this file; the network's weights, in a file there, are drawn."""
    options = {**OPTIONS[name], **options}
    if name == "attention_predictor":
        mark = fingerprint(model.model)
        path = folder / f"{mark}.safetensors"
        if not path.exists():
            generator = torch.Generator().manual_seed(3)
            drawn = {n: torch.randn(shape, generator=generator) / 3 for n, shape in SHAPES.items()}
            bare = foveate.get_method(name)
            write_plugin(path, bare, model.config.model_type, mark, drawn)
        options["weights"] = path
    return foveate.get_method(name, **options)


def read_steps(report, run: oracle.Run, prompt: int) -> list[Hide]:
    """What every step did not read, for the sequences of the run."""
    hides = []
    for step, layers in enumerate(report.decoding.chosen, start=1):
        if step < run.logits.shape[1]:
            at = prompt + step - 1
            hides += [Hide(layer, ~chosen[run.beams[:, step]], at, at) for layer, chosen in layers.items()]
    return hides


def errors(model, batch: dict, run: oracle.Run, hides: list[Hide], more: list[Hide] = ()) -> Tensor:
    """hides: by sequence. more: by prompt."""
    every = [*hides, *(hide.rows(run.rows) for hide in more)]
    dense, _ = oracle.dense_logits(model, batch, run.sequences, every)
    return (dense - run.logits).abs().amax((0, 2))


def everywhere():
    factors = (list(OPTIONS), list(tiny.CORE_DECODERS), list(tiny.BATCHES), list(oracle.DECODING), ["eager", "sdpa"])
    few = pairwise(*factors)
    return [
        pytest.param(
            *case,
            marks=[] if case in few or (case[0] == "attention_predictor" and case[1] == "llava") else pytest.mark.slow,
        )
        for case in product(*factors)
    ]


@pytest.mark.parametrize(("name", "family", "batch", "decoding", "attn"), everywhere())
def test_logits_equal_the_dense_reference(name, family, batch, decoding, attn, method_for):
    model, batch = tiny.build(family, attn), tiny.inputs(family, **tiny.BATCHES[batch])
    prompt = batch["input_ids"].shape[1]
    with foveate.prune(model, method_for(name, model), record=True) as pruned:
        run = oracle.run(model, batch, **oracle.DECODING[decoding])
        report = pruned.report
    hides = read_steps(report, run, prompt)
    assert any((~chosen).sum() > batch["attention_mask"].numel() / 4 for chosen in report.decoding.chosen[0].values())
    assert errors(tiny.build(family, "eager"), batch, run, hides).max() < TOLERANCE
    assert report.decoding.steps == oracle.STEPS - 1
    assert 0 < report.decoding.share < 1
    assert report.kv_bytes == report.kv_bytes_unpruned, "nothing is evicted"


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("decoding", oracle.DECODING)
def test_keeping_everything_changes_nothing_at_all(name, decoding, method_for):
    model, batch = tiny.build("llava"), tiny.inputs("llava", **tiny.BATCHES["ragged"])
    untouched = oracle.run(model, batch, **oracle.DECODING[decoding])
    with foveate.prune(model, method_for(name, model, keep=1.0)):
        assert torch.equal(oracle.run(model, batch, **oracle.DECODING[decoding]).logits, untouched.logits)
    with foveate.prune(model, method_for(name, model, keep=1000)):
        gap = (oracle.run(model, batch, **oracle.DECODING[decoding]).logits - untouched.logits).abs().max()
    assert gap < TOLERANCE, "every token is read, in another order"


def text_of(batch: dict) -> Tensor:
    return batch["attention_mask"].bool() & ~image_tokens(batch)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_step_reads_the_text_and_each_image_s_share(name, method_for):
    spec = tiny.BATCHES["ragged"]
    model, batch = tiny.build("llava"), tiny.inputs("llava", **spec)
    method = method_for(name, model)
    with foveate.prune(model, method, record=True) as pruned:
        oracle.run(model, batch, max_new_tokens=9)
        steps = pruned.report.decoding.chosen
    length = batch["input_ids"].shape[1]
    assert len(steps) == 8
    read = held = 0
    for number, layers in enumerate(steps, start=1):
        assert sorted(layers) == list(range(method.dense_layers, 4))
        everything = method.refresh is not None and number % method.refresh == 0
        for chosen in layers.values():
            assert chosen.shape[2] == length + number
            assert (chosen[:, :, length:]).all(), "what was generated is always read"
            assert chosen[..., :length].transpose(0, 1)[:, text_of(batch)].all()
            assert not (chosen[..., :length].transpose(0, 1)[:, ~batch["attention_mask"].bool()]).any()
            for row, (images, mask) in enumerate(zip(spec["images"], image_tokens(batch), strict=True)):
                for image in mask.nonzero().flatten().split(36):
                    assert len(image) == 36
                    counts = chosen[row][:, image].sum(-1)
                    assert (counts == (36 if everything else int(method.keep * 36))).all()
                assert images == len(mask.nonzero()) // 36
            read += int(chosen.expand(-1, 2, -1).sum())
            held += 2 * (int(batch["attention_mask"].sum()) + number * len(chosen))
        dense = method.dense_layers * 2 * (int(batch["attention_mask"].sum()) + number * len(batch["attention_mask"]))
        read, held = read + dense, held + dense
    assert (pruned.report.decoding.read, pruned.report.decoding.held) == (read, held)
    assert pruned.report.to_dict()["decoding"] == {"steps": 8, "read": read, "held": held}
    assert f"{read / held:.0%} of it read in a step" in str(pruned.report)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_sample_reads_the_same_alone_and_in_a_batch(name, method_for):
    model = tiny.build("llava")
    batch = tiny.inputs("llava", images=(1, 2, 0), text=(3, 9, 5))
    with foveate.prune(model, method_for(name, model)):
        together = oracle.run(model, batch, max_new_tokens=10)
        for row, pictures in enumerate((slice(0, 1), slice(1, 3))):
            real = batch["attention_mask"][row].bool()
            single = {key: batch[key][row : row + 1, real] for key in ("input_ids", "attention_mask")}
            alone = oracle.run(model, {**single, "pixel_values": batch["pixel_values"][pictures]}, max_new_tokens=10)
            assert torch.equal(alone.sequences[0, -10:], together.sequences[row, -10:])
            assert (alone.logits[0] - together.logits[row]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("image", [False, True], ids=["words", "image"])
def test_a_second_turn_equals_the_dense_reference(name, image, method_for):
    model, dense = tiny.build("llava"), tiny.build("llava", "eager")
    batch = tiny.inputs("llava", images=(1, 2), text=(5, 3))
    with foveate.prune(model, method_for(name, model), record=True) as pruned:
        first = oracle.run(model, batch, max_new_tokens=6)
        hides = read_steps(pruned.report, first, batch["input_ids"].shape[1])
        turn = tiny.next_turn(model, batch, first.sequences, image)
        second = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=8)
        later = read_steps(pruned.report, second, turn["input_ids"].shape[1])
    assert len(pruned.report.decoding.chosen) == 7
    _, cache = oracle.dense_logits(dense, batch, first.sequences, hides)
    assert errors(dense, turn | {tiny.CACHE: cache}, second, later).max() < TOLERANCE
    if image:
        new = (turn["input_ids"] == tiny.IMAGE).sum(1) - (batch["input_ids"] == tiny.IMAGE).sum(1)
        assert (new == 36).all()
        chosen = pruned.report.decoding.chosen[0][2]
        fresh = (turn["input_ids"] == tiny.IMAGE).clone()
        fresh[:, : first.sequences.shape[1]] = False
        share = int(OPTIONS[name]["keep"] * 36)
        assert (chosen[0, :, : fresh.shape[1]][:, fresh[0]].sum(-1) == share).all(), "a new image has its share, too"


def test_a_turn_chooses_anew():
    """What the second question looks at is not what the first one did, and all of it is still there."""
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    with foveate.prune(model, "per_turn", keep=0.25, window=4, record=True) as pruned:
        first = oracle.run(model, batch, max_new_tokens=4)
        one = pruned.report.decoding.chosen
        turn = tiny.next_turn(model, batch, first.sequences, False)
        oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=4)
        two = pruned.report.decoding.chosen
    length = batch["input_ids"].shape[1]
    for layer in range(4):
        assert all(torch.equal(step[layer][..., :length], one[0][layer][..., :length]) for step in one)
        assert not torch.equal(one[0][layer][..., :length], two[0][layer][..., :length])


@pytest.mark.parametrize(
    "other", [foveate.FoPru(keep=0.5), foveate.FastV(keep=0.5, layer=2), foveate.VisionZip(keep=0.5)]
)
@pytest.mark.parametrize("batch", tiny.BATCHES)
def test_with_a_method_of_another_place(other, batch, method_for):
    model, batch = tiny.build("llava"), tiny.inputs("llava", **tiny.BATCHES[batch])
    prompt = batch["input_ids"].shape[1]
    with foveate.prune(model, [other, method_for("attention_predictor", model, keep=0.2)], record=True) as pruned:
        run = oracle.run(model, batch, **oracle.BEAMS)
        report = pruned.report
    steps = read_steps(report, run, prompt)
    for step in report.decoding.chosen:
        for layer, chosen in step.items():
            kept = report.layers[layer].kept
            kept = kept.repeat_interleave(len(chosen) // len(kept), 0)
            assert not (chosen[..., :prompt] & ~kept).any(), "nothing that is gone is read"
    if other.only_drops:
        assert errors(tiny.build("llava", "eager"), batch, run, steps, oracle.hidden(report, prompt)).max() < TOLERANCE


def test_memory_follows_what_a_mask_hides_later(method_for):
    """Entries that a later mask hides leave a pruned cache, and those behind them move."""
    model = tiny.build("llava")
    batch = tiny.inputs("llava", images=(1, 1), text=(6, 6))
    methods = [foveate.Uniform(keep=0.5), method_for("pages", model)]
    with foveate.prune(model, methods, record=True) as pruned:
        first = oracle.run(model, batch, max_new_tokens=3)
        slots = [layer.memory.slots.clone() for layer in first.cache.layers]
        turn = tiny.next_turn(model, batch, first.sequences, False)
        turn["attention_mask"][:, :2] = 0
        second = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=5)
        for before, layer in zip(slots, second.cache.layers, strict=True):
            held = layer.memory.slots[before >= 0]
            assert torch.equal(held, before[before >= 0] - 2)
        image = image_tokens(batch)
        for step in pruned.report.decoding.chosen:
            for chosen in step.values():
                assert (chosen[..., : image.shape[1]].transpose(0, 1)[:, image].sum(-1) == 2 * 4).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_cache_can_be_copied_and_cropped(name, method_for):
    """As prompt caches are: the copy goes on as the original would, and a crop takes the last answer back."""
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    with foveate.prune(model, method_for(name, model, refresh=None)):
        first = oracle.run(model, batch, max_new_tokens=4)
        turn = tiny.next_turn(model, batch, first.sequences, False)
        runs = [oracle.run(model, turn | {tiny.CACHE: copy.deepcopy(first.cache)}, max_new_tokens=5) for _ in range(2)]
        assert torch.equal(runs[0].logits, runs[1].logits)
        cropped, prompt = copy.deepcopy(first.cache), batch["input_ids"].shape[1]
        cropped.crop(-2)
        assert cropped.layers[2].memory.end == prompt, "the prompt is still there"
        again = {**turn, "input_ids": turn["input_ids"][:, :-4], "attention_mask": turn["attention_mask"][:, :-4]}
        oracle.run(model, again | {tiny.CACHE: cropped}, max_new_tokens=3)
        into, length = copy.deepcopy(first.cache), 20
        into.crop(length - into.get_seq_length())
        memory = into.layers[2].memory
        assert memory.end == into.layers[2].physical == length
        image = image_tokens(batch)[0, :length]
        assert sorted(memory.slots[memory.slots >= 0].tolist()) == image.nonzero().flatten().tolist()
        assert sorted(memory.others[memory.others >= 0].tolist()) == (~image).nonzero().flatten().tolist()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_half_precision(family, method_for):
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    method = method_for("attention_predictor", model)
    model, dense = model.to(torch.bfloat16), tiny.build(family, "eager").to(torch.bfloat16)
    with foveate.prune(model, method, record=True) as pruned:
        run = oracle.run(model, batch, **oracle.GREEDY)
    hides = read_steps(pruned.report, run, batch["input_ids"].shape[1])
    assert errors(dense, batch, run, hides).max() < 0.3


# Refusals ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_right_is_refused():
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    with pytest.raises(foveate.UnsupportedError, match="plphp leaves each head other entries"):
        foveate.prune(model, ["plphp", "last_step"])
    with pytest.raises(ValueError, match=r"dense_layers must be in \[0, 3\] for this model, got 4"):
        foveate.prune(model, "last_step", dense_layers=4)
    with (
        foveate.prune(model, "last_step"),
        pytest.raises(foveate.UnsupportedError, match="one decoding step at a time"),
    ):
        model.generate(**batch, prompt_lookup_num_tokens=3, max_new_tokens=4)
    with pytest.raises(foveate.UnsupportedError, match="which mllama does not offer"):
        foveate.prune(tiny.build("mllama"), "last_step")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("last_step", {"refresh": 0}, "refresh must be an int >= 1"),
        ("last_step", {"dense_layers": -1}, "dense_layers must be an int >= 0"),
        ("pages", {"page": 0}, "page must be an int >= 1"),
        ("per_turn", {"window": 0}, "window must be an int >= 1"),
        ("attention_predictor", {"history": 0}, "history must be an int >= 1"),
        ("attention_predictor", {"block": (2, 0)}, "block must be an int >= 1"),
        ("attention_predictor", {"block": (2, 2, 2)}, "block must be rows and columns"),
        ("attention_predictor", {"block": "2"}, "block must be an int >= 1"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        foveate.get_method(name, **options)


# Negative controls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mistake", ["nothing hidden", "one step late", "other heads", "other beams"])
def test_the_oracle_sees_a_mistake(mistake, method_for):
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    prompt = batch["input_ids"].shape[1]
    with foveate.prune(model, method_for("last_step", model), record=True) as pruned:
        run = oracle.run(model, batch, **oracle.BEAM_SAMPLE)
    assert len(run.beams[0].unique()) > 1, "the beams cross"
    if mistake == "other beams":
        run.beams = (run.beams + 1) % 3
    hides = read_steps(pruned.report, run, prompt)
    if mistake == "nothing hidden":
        hides = []
    if mistake == "one step late":
        hides = [Hide(h.layer, h.keys, h.first_query + 1, h.last_query + 1) for h in hides]
    if mistake == "other heads":
        hides = [Hide(h.layer, h.keys.flip(1), h.first_query, h.last_query) for h in hides]
    assert errors(tiny.build("llava", "eager"), batch, run, hides).max() > FAR
