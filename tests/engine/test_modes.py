"""Other ways to run a pruned model: each equals the dense reference, or the plain pruned run."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass

import oracle
import pytest
import tiny
import torch
from cases import BEFORE_LLM, FITS, PLACES, TOLERANCE, check_second_turn, prune, pruned_run
from oracle import hidden, seen_and_kept
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.streamers import BaseStreamer

import foveate
from foveate.methods.base import CacheMethod

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
@pytest.mark.sampled(5)
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
            out = model(input_ids=token[None, None], **{tiny.CACHE: getattr(out, tiny.CACHE)}, use_cache=True, **more)


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
@pytest.mark.parametrize("name", BEFORE_LLM)
@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.sampled(5)
def test_without_a_cache_the_logits_are_the_same(family, name, batch):
    """What is dropped before the LLM needs no cache; every step is then a prefill with the same choice."""
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family)
    # Without a cache, an answer that holds a placeholder by chance would be one of the prompt.
    said = dict(max_new_tokens=5, suppress_tokens=[tiny.of(model).image_id])
    cached, _ = pruned_run(model, name, batch, **said)
    uncached, _ = pruned_run(model, name, batch, **said, use_cache=False)
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


@decoder_places
def test_guesses_accepted_at_once_were_not_read_with_the_prompt(family, name):
    """The first forward of prompt lookup holds guesses, too; right ones must see the same as in greedy decoding."""
    batch, model = tiny.inputs(family, text=(30,)), tiny.build(family)
    batch["input_ids"][:, -3:] = batch["input_ids"][:, -30:-27]
    script = torch.cat([batch["input_ids"], batch["input_ids"][:, -27:-17]], 1)  # what came then comes again
    said = dict(max_new_tokens=6, logits_processor=[oracle.Replay(script)])
    greedy, _ = pruned_run(model, name, batch, **said)
    forwards = []
    handle = model.lm_head.register_forward_hook(lambda *_: forwards.append(1))
    lookup, report = pruned_run(model, name, batch, **said, prompt_lookup_num_tokens=3)
    handle.remove()
    assert torch.equal(lookup.sequences, script[:, :-4]) and len(forwards) < 6, "guesses were accepted"
    assert (lookup.logits - greedy.logits).abs().max() < TOLERANCE
    hides = hidden(report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, lookup, hides).max() < TOLERANCE


@decoder_places
def test_chunked_prefill_is_right_or_refused(family, name):
    batch, model = tiny.inputs(family), tiny.build(family)
    try:
        run, report = pruned_run(model, name, batch, **oracle.GREEDY, prefill_chunk_size=16)
    except foveate.UnsupportedError as error:
        assert "prefill_chunk_size" in str(error)
        return
    if report is None:  # before 5.24 transformers itself drops the pictures of a chunked prompt: nothing to prune
        chunked = oracle.run(model, batch, **oracle.GREEDY, prefill_chunk_size=16)
        assert tiny.CACHE == "past_key_values" and torch.equal(run.logits, chunked.logits)
        return
    hides = hidden(report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() < TOLERANCE


@decoder_places
@backends
@torch.no_grad()
def test_a_forward_padded_on_the_right_equals_the_dense_reference(family, name, attn):
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family, attn)
    real = batch["attention_mask"].sum(1).tolist()
    for key in batch.keys() & {"input_ids", "attention_mask", "mm_token_type_ids"}:
        batch[key] = torch.stack([row.roll(n) for row, n in zip(batch[key], real, strict=True)])
    assert batch["attention_mask"][:, 0].all() and not batch["attention_mask"][:, -1].all()
    with prune(model, name) as pruned:
        out = model(**batch)
    dense_model = tiny.build(family, "eager")
    with oracle.masked(dense_model, hidden(pruned.report, batch["input_ids"].shape[1])):
        dense = dense_model(**batch)
    alive = batch["attention_mask"].bool()
    for layer in pruned.report.layers:
        if layer.since == "prefill":
            alive = alive & layer.kept[:, 0]
    assert (out.logits - dense.logits)[alive].abs().max() < TOLERANCE


class Largest(TorchDispatchMode):
    """Watches how large tensors get."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


@decoder_places
def test_no_attention_map_of_the_prompt_is_made(family, name):
    batch, model = tiny.inputs(family, text=(600,)), tiny.build(family, "sdpa")
    length = batch["input_ids"].shape[1]
    few = {"rows": 8} if name == "plphp" else {}  # all rows are read in chunks, which this prompt does not fill
    with prune(model, name, **few), Largest() as watch:
        oracle.run(model, batch, max_new_tokens=2)
    assert watch.size < length**2 / 2


TOGETHER = {
    "before and inside": [foveate.FoPru(keep=0.5), foveate.FastV(keep=0.25, layer=2)],
    "before and after": [foveate.FoPru(keep=0.5), foveate.PLPHP(keep=0.25, start_layer=0)],
    "inside and after": [foveate.FastV(keep=0.5, layer=2), foveate.PLPHP(keep=0.25, start_layer=0)],
    "inside and at once": [
        foveate.FastV(keep=0.5, layer=2),
        foveate.PLPHP(keep=0.25, start_layer=0, alpha=0.6, beta=0.3),
    ],
    "diverse, in stages, by a window": [
        foveate.DivPrune(keep=0.75),
        foveate.PyramidDrop(keep=0.25),
        foveate.VisualSnapKV(keep=0.5, window=8),
    ],
    "by [CLS], by raters, by elite rows": [
        foveate.VTCCLS(keep=0.75),
        foveate.SparseVLM(keep=0.5, layers=(1, 3)),
        foveate.AirCache(keep=0.4),
    ],
    "everywhere": [
        foveate.FoPru(keep=0.75),
        foveate.FastV(keep=0.5, layer=1),
        foveate.PLPHP(keep=0.25, start_layer=0),
    ],
}


@dataclass
class EverySecondLayer(CacheMethod):
    """Evicts half of each image in layers 0, 2, ... and nothing in the others, which still need full masks."""

    name = "every_second_layer"
    needs_all_layers = True

    def first_layer(self):
        return 0

    def budgets(self, statistics, groups):
        return torch.stack([groups.count if i % 2 else groups.count // 2 for i in range(len(statistics))])

    def select(self, attention, budget):
        ranks = attention.argsort(-1, descending=True).argsort(-1)
        return (ranks < budget[:, None, None]) & (attention > -torch.inf)


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
@pytest.mark.parametrize("batch", tiny.BATCHES)
@backends
@pytest.mark.parametrize("decoding", oracle.DECODING)
@pytest.mark.sampled(5)
def test_pruned_and_full_layers_live_side_by_side(family, batch, decoding, attn):
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family, attn)
    with foveate.prune(model, EverySecondLayer(keep=0.5), record=True) as pruned:
        run = oracle.run(model, batch, **oracle.DECODING[decoding])
        report = pruned.report
    assert [layer.kept_length < layer.length for layer in report.layers] == [True, False, True, False]
    hides = hidden(report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() < TOLERANCE


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize("batch", tiny.BATCHES)
@backends
@pytest.mark.sampled(5)
def test_methods_together_equal_the_dense_reference(family, together, batch, attn):
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family, attn)
    with foveate.prune(model, TOGETHER[together], record=True) as pruned:
        run = oracle.run(model, batch, **oracle.GREEDY)
    hides = seen_and_kept(pruned.report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() < TOLERANCE


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
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


@places
@backends
@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.sampled(5)
def test_a_second_turn_of_text(family, name, batch, attn):
    batch = tiny.inputs(family, **tiny.BATCHES[batch])
    check_second_turn(tiny.build(family, attn), name, batch, image=False)


@places
@backends
@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.sampled(5)
def test_a_second_turn_with_a_new_image(family, name, batch, attn):
    batch = tiny.inputs(family, **tiny.BATCHES[batch])
    hides, later = check_second_turn(tiny.build(family, attn), name, batch, image=True)
    if family != "mllama":
        prompt = batch["input_ids"].shape[1]
        assert any(hide.keys[..., prompt + 6 :].any() for hide in hides[4:]), "the new image was pruned, too"
        assert all(later.images), "the report tells of the new images"


@places
@pytest.mark.parametrize("batch", tiny.BATCHES)
def test_seen_tells_what_a_later_prefill_saw(family, name, batch):
    batch, model, dense = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family), tiny.build(family, "eager")
    with prune(model, name) as pruned:
        first = oracle.run(model, batch, max_new_tokens=6)
        hides = seen_and_kept(pruned.report, batch["input_ids"].shape[1])
        turn = tiny.next_turn(model, batch, first.sequences, image=True)
        second = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=6)
        later = seen_and_kept(pruned.report, turn["input_ids"].shape[1])
    _, cache = oracle.dense_logits(dense, batch, first.sequences, hides)
    error = oracle.errors(dense, turn | {tiny.CACHE: cache}, second, hides + later)
    assert error.max() < TOLERANCE


@decoder_places
def test_the_first_image_may_come_in_a_later_turn(family, name):
    batch, model, dense = tiny.inputs(family, images=(0,)), tiny.build(family), tiny.build(family, "eager")
    with prune(model, name) as pruned:
        first = oracle.run(model, batch, max_new_tokens=4)
        no_grids = {"image_grid_thw": torch.zeros(0, 3, dtype=torch.long)} if family == "qwen2_5_vl" else {}
        turn = tiny.next_turn(model, batch | no_grids, first.sequences, image=True)
        second = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=4)
        hides = hidden(pruned.report, turn["input_ids"].shape[1])
    assert any(hide.keys.any() for hide in hides)
    _, cache = oracle.dense_logits(dense, batch, first.sequences)
    assert oracle.errors(dense, turn | {tiny.CACHE: cache}, second, hides).max() < TOLERANCE


@places
@pytest.mark.parametrize("batch", tiny.BATCHES)
def test_a_copied_cache_goes_on_by_itself(family, name, batch):
    """As when many questions follow one picture: the copies must not share what they drop and append."""
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family)
    with prune(model, name):
        first = oracle.run(model, batch, max_new_tokens=4)
        spare = copy.deepcopy(first.cache)
        turn = tiny.next_turn(model, batch, first.sequences)
        a = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=4)
        b = oracle.run(model, turn | {tiny.CACHE: spare}, max_new_tokens=4)
    assert torch.equal(a.logits, b.logits)


@places
@pytest.mark.parametrize("batch", tiny.BATCHES)
def test_a_cache_cut_selected_and_repeated_stays_right(family, name, batch):
    """`crop`, `batch_select_indices` and `batch_repeat_interleave`, as users and decoding strategies call them."""
    batch, model, dense = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family), tiny.build(family, "eager")
    last = torch.tensor([len(batch["input_ids"]) - 1])
    rows, length = last.repeat_interleave(2), batch["input_ids"].shape[1]

    def reshape(model, cache):
        if family != "mllama":  # transformers would crop its image features, too
            cache.crop(-3)
        cache.batch_select_indices(last)
        cache.batch_repeat_interleave(2)
        if family == "qwen2_5_vl":
            model.model.rope_deltas = model.model.rope_deltas[rows]
        return cache

    with prune(model, name) as pruned:
        first = oracle.run(model, batch, max_new_tokens=6)
        hides = hidden(pruned.report, length)
        ids = first.sequences if family == "mllama" else first.sequences[:, : length + 2]
        picked = {k: v[rows] for k, v in batch.items() if k in ("attention_mask", "cross_attention_mask")}
        turn = tiny.next_turn(model, picked, ids[rows])
        second = oracle.run(model, turn | {tiny.CACHE: reshape(model, first.cache)}, max_new_tokens=4)
    _, cache = oracle.dense_logits(dense, batch, first.sequences, hides)
    turn[tiny.CACHE] = reshape(dense, cache)
    assert oracle.errors(dense, turn, second, [hide.rows(rows) for hide in hides]).max() < TOLERANCE


@places
def test_one_block_serves_many_prompts(family, name):
    """No state of one prompt reaches the next, whatever its shape."""
    model = tiny.build(family)
    specs = [dict(images=(1,)), tiny.BATCHES["ragged"], dict(images=(2,), seed=2), dict(images=(1,))]
    alone = [pruned_run(model, name, tiny.inputs(family, **spec), max_new_tokens=4)[0] for spec in specs]
    with prune(model, name):
        together = [oracle.run(model, tiny.inputs(family, **spec), max_new_tokens=4) for spec in specs]
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(alone, together, strict=True))


@places
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


@places
def test_one_pruned_model_serves_several_threads(family, name):
    """As an untouched model does: every thread gets the answer to its own picture."""
    model = tiny.build(family)
    prompts = [tiny.inputs(family, images=(1 + i % 2,), seed=i) for i in range(4)]
    wrong: list[str] = []
    start = threading.Barrier(len(prompts))
    options = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)

    def generate(i: int) -> torch.Tensor:
        return torch.stack(model.generate(**prompts[i], **options).logits)

    def work(i: int) -> None:
        try:
            start.wait(timeout=30)
            for _ in range(6):
                if not torch.equal(generate(i), alone[i]):
                    wrong.append(f"prompt {i} got another answer")
        except Exception as error:
            wrong.append(f"prompt {i}: {error!r}")

    with prune(model, name):
        alone = [generate(i) for i in range(len(prompts))]
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert wrong == []
