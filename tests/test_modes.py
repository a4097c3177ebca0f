"""Other ways to run a pruned model: each equals the dense reference, or the plain pruned run."""

from __future__ import annotations

import threading

import oracle
import pytest
import tiny
import torch
from cases import BEFORE_LLM, FITS, PLACES, TOLERANCE, prune, pruned_run
from oracle import hidden
from transformers.generation.streamers import BaseStreamer

import foveate

places = pytest.mark.parametrize(("family", "name"), PLACES)
decoder_places = pytest.mark.parametrize(("family", "name"), [p for p in PLACES if p[0] != "mllama"])
backends = pytest.mark.parametrize("attn", ["eager", "sdpa"])


@decoder_places  # mllama's image token lies outside its vocabulary, which prompt lookup cannot index
@backends
def test_prompt_lookup_generates_what_greedy_does(family, name, attn):
    batch, model = tiny.inputs(family, text=(30,)), tiny.build(family, attn)
    batch["input_ids"][:, -10:] = batch["input_ids"][:, -30:-20]  # something to look up
    batch["input_ids"][:, -20:-10] = batch["input_ids"][:, -30:-20]
    greedy, _ = pruned_run(model, name, batch, **oracle.GREEDY)
    lookup, report = pruned_run(model, name, batch, **oracle.GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(lookup.sequences, greedy.sequences)
    assert (lookup.logits - greedy.logits).abs().max() < TOLERANCE
    hides = hidden(report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, lookup, hides).max() < TOLERANCE


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@places
def test_streaming_brings_the_same_tokens(family, name):
    batch, model, streamer = tiny.inputs(family), tiny.build(family), Collect()
    greedy, _ = pruned_run(model, name, batch, **oracle.GREEDY)
    with prune(model, name):
        model.generate(**batch, **oracle.GREEDY, streamer=streamer)
    assert streamer.ended and streamer.tokens == greedy.sequences[0].tolist()


@places
@backends
@pytest.mark.parametrize("batch", tiny.BATCHES)
@torch.no_grad()
def test_plain_forward_equals_the_dense_reference(family, name, batch, attn):
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family, attn)
    with prune(model, name) as pruned:
        out = model(**batch, use_cache=True)
        report = pruned.report
    dense_model = tiny.build(family, "eager")
    with oracle.masked(dense_model, hidden(report, batch["input_ids"].shape[1])):
        dense = dense_model(**batch, use_cache=True)
    assert out.logits.shape == dense.logits.shape, "outside the decoder layers everything has its full length"
    # Rows of dropped tokens mean nothing; all others must agree.
    alive = batch["attention_mask"].bool()
    for layer in report.layers:
        if layer.kind == "self" and layer.since == "prefill":
            alive = alive & layer.kept[:, 0]
    assert (out.logits - dense.logits)[alive].abs().max() < TOLERANCE


@places
@torch.no_grad()
def test_forward_by_hand_goes_on_like_generate(family, name):
    batch, model = tiny.inputs(family), tiny.build(family)
    run, _ = pruned_run(model, name, batch, **oracle.GREEDY)
    with prune(model, name):
        out = model(**batch, use_cache=True)
        for step, token in enumerate(run.sequences[0, batch["input_ids"].shape[1] :]):
            assert (out.logits[:, -1] - run.logits[:, step]).abs().max() < TOLERANCE
            more = {}
            if family == "mllama":
                more["cross_attention_mask"] = batch["cross_attention_mask"][:, -1:]
            out = model(
                input_ids=token[None, None], past_key_values=out.past_key_values, use_cache=True, **more
            )


@pytest.mark.parametrize("family", tiny.DECODER_FAMILIES)
@pytest.mark.parametrize("name", BEFORE_LLM)
def test_without_a_cache_the_logits_are_the_same(family, name):
    """What is dropped before the LLM needs no cache; every step is then a prefill with the same choice."""
    batch, model = tiny.inputs(family), tiny.build(family)
    cached, _ = pruned_run(model, name, batch, max_new_tokens=5)
    uncached, _ = pruned_run(model, name, batch, max_new_tokens=5, use_cache=False)
    assert (cached.logits - uncached.logits).abs().max() < TOLERANCE


class Force(torch.nn.Module):
    """A logits processor that makes the model say its own image token."""

    def forward(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([tiny.IMAGE]), 0.0)


@decoder_places
def test_a_generated_image_token_is_only_text(family, name):
    batch, model = tiny.inputs(family), tiny.build(family)
    run, report = pruned_run(model, name, batch, max_new_tokens=6, logits_processor=[Force()])
    assert (run.sequences[:, -6:] == tiny.IMAGE).all()
    hides = hidden(report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() < TOLERANCE


@places
@backends
def test_a_static_cache_is_right_or_refused(family, name, attn):
    batch, model = tiny.inputs(family), tiny.build(family, attn)
    static = dict(cache_implementation="static", disable_compile=True)
    try:
        run, report = pruned_run(model, name, batch, **oracle.GREEDY, **static)
    except foveate.UnsupportedError as error:
        assert "cache" in str(error)
        return
    hides = hidden(report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() < TOLERANCE


@pytest.mark.parametrize("family", tiny.DECODER_FAMILIES)
@pytest.mark.parametrize("second", ["fastv", "plphp"])
@pytest.mark.parametrize("batch", tiny.BATCHES)
def test_two_methods_together(family, second, batch):
    """FoPru looks at the image alone, so what it hides can be read from a run without the second method."""
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family)
    length = batch["input_ids"].shape[1]
    _, before = pruned_run(model, "fopru_rank", batch, max_new_tokens=2)
    first = foveate.get_method("fopru", keep=0.25)
    other = {"fastv": dict(keep=4, layer=2), "plphp": dict(keep=4, delta=0.0, start_layer=1)}[second]
    with foveate.prune(model, [first, foveate.get_method(second, **other)], record=True) as pruned:
        run = oracle.run(model, batch, **oracle.GREEDY)
        report = pruned.report
    assert report.layers[-1].kept_length < before.layers[-1].kept_length
    hides = hidden(before, length) + hidden(report, length)
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() < TOLERANCE


# Several turns on one cache ---------------------------------------------------------------------------------


def check_second_turn(family, name, batch, attn, image):
    model, dense = tiny.build(family, attn), tiny.build(family, "eager")
    with prune(model, name) as pruned:
        first = oracle.run(model, batch, max_new_tokens=6)
        hides = hidden(pruned.report, batch["input_ids"].shape[1])
        turn = tiny.next_turn(model, batch, first.sequences, image)
        second = oracle.run(model, turn | {"past_key_values": first.cache}, max_new_tokens=8)
        later = pruned.report
    _, cache = oracle.dense_logits(dense, batch, first.sequences, hides)
    hides = hides + hidden(later, turn["input_ids"].shape[1])
    assert oracle.errors(dense, turn | {"past_key_values": cache}, second, hides).max() < TOLERANCE
    for layer in second.cache.layers:
        for tensor in (layer.keys, layer.values):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return hides, later


@places
@backends
@pytest.mark.parametrize("batch", tiny.BATCHES)
def test_a_second_turn_of_text(family, name, batch, attn):
    batch = tiny.inputs(family, **tiny.BATCHES[batch])
    check_second_turn(family, name, batch, attn, image=False)


@places
@backends
@pytest.mark.parametrize("batch", tiny.BATCHES)
def test_a_second_turn_with_a_new_image(family, name, batch, attn):
    batch = tiny.inputs(family, **tiny.BATCHES[batch])
    hides, later = check_second_turn(family, name, batch, attn, image=True)
    if family != "mllama":
        prompt = batch["input_ids"].shape[1]
        assert any(hide.keys[..., prompt + 6 :].any() for hide in hides[4:]), "the new image was pruned, too"
        assert all(later.images), "the report tells of the new images"


@places
def test_one_block_serves_many_prompts(family, name):
    """No state of one prompt reaches the next, whatever its shape."""
    model = tiny.build(family)
    specs = [dict(images=(1,)), tiny.BATCHES["ragged"], dict(images=(2,), seed=2), dict(images=(1,))]
    alone = [pruned_run(model, name, tiny.inputs(family, **spec), max_new_tokens=4)[0] for spec in specs]
    with prune(model, name):
        together = [oracle.run(model, tiny.inputs(family, **spec), max_new_tokens=4) for spec in specs]
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(alone, together, strict=True))


@decoder_places
def test_a_prompt_without_images_is_untouched(family, name):
    model, batch = tiny.build(family), tiny.inputs(family, images=(0,))
    untouched = oracle.run(model, batch, max_new_tokens=4)
    with prune(model, name) as pruned:
        run = oracle.run(model, batch, max_new_tokens=4)
        assert pruned.report.images == [[]]
    assert torch.equal(run.logits, untouched.logits)


# Other models in the process --------------------------------------------------------------------------------


@places
@backends
def test_a_second_model_of_the_class_is_untouched(family, name, attn):
    batch = tiny.inputs(family)
    model, other = tiny.build(family, attn), tiny.build(family, attn, seed=1)
    before = oracle.run(other, batch, **oracle.GREEDY)
    expected, _ = pruned_run(model, name, batch, **oracle.GREEDY)
    with prune(model, name):
        for _ in range(2):
            assert torch.equal(oracle.run(other, batch, **oracle.GREEDY).logits, before.logits)
            assert torch.equal(oracle.run(model, batch, **oracle.GREEDY).logits, expected.logits)


@places
def test_models_in_several_threads(family, name):
    """An untouched model between two pruned ones, all of one class and at the same time."""
    batch = tiny.inputs(family)
    models = [tiny.build(family, seed=i) for i in range(3)]
    names = [name, None, next(n for f, n in reversed(FITS) if f == family)]
    wrong: list[str] = []
    start = threading.Barrier(len(models))

    def generate(i: int) -> oracle.Run:
        if names[i] is None:
            return oracle.run(models[i], batch, max_new_tokens=6)
        return pruned_run(models[i], names[i], batch, max_new_tokens=6)[0]

    def work(i: int) -> None:
        try:
            start.wait(timeout=30)
            for _ in range(4):
                if not torch.equal(generate(i).logits, alone[i].logits):
                    wrong.append(f"model {i} differs")
        except Exception as error:
            wrong.append(f"model {i}: {error!r}")

    alone = [generate(i) for i in range(len(models))]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert wrong == []
