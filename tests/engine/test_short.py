"""Methods before the LLM on caches whose layers stay as they are, and on prompts that run in chunks.

Static, quantised and offloaded caches hold what the decoder is handed, so pruning may change neither tokens nor logits
against the dense reference, which knows nothing of these caches.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from itertools import product

import oracle
import pytest
import tiny
import torch
from cases import BEFORE_LLM, TOLERANCE, prune, pruned_run
from sampling import pairwise
from transformers import CompileConfig, DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import Cache, QuantizedLayer

import foveate
from foveate.engine import gaps, rows, session, short
from foveate.engine.upstream import SLICES_ENCODED

pytestmark = pytest.mark.sampled(8)

# Plain ones, M-RoPE, DeepStack, tiles, masks and windows of its own, a prompt that sees itself both ways, hybrids.
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "paligemma", "qwen3_5", "lfm2_vl")
ATTENDING = FAMILIES[:4]  # to all of the prompt, in all layers
chunked = pytest.mark.skipif(not SLICES_ENCODED, reason="this release loses the pictures of a prompt in chunks")


class Kept(QuantizedLayer):
    """A quantised layer without a library: to whole numbers of so many parts, or losing nothing."""

    parts: int | None = None

    def __init__(self):
        super().__init__(residual_length=4)

    def _quantize(self, tensor, axis):
        if self.parts is None:
            return tensor.clone(), 1
        scale = tensor.abs().amax(-1, keepdim=True) / self.parts
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, quantised):
        return quantised[0] * quantised[1]


class Rounded(Kept):
    parts = 127


class Stream(contextlib.nullcontext):
    """What an offloaded cache does beside its layers on a GPU."""

    def wait_stream(self, other):
        pass


def layers(model) -> int:
    return len(tiny.of(model).language_model(model).layers)


def static(model, room=160) -> Cache:
    return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=room)


def quantised(model) -> Cache:
    return Cache(layers=[Kept() for _ in range(layers(model))])


def offloaded(model) -> Cache:
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, False, Stream()
    return cache


KINDS = {kind.__name__: kind for kind in (static, quantised, offloaded)}
STATIC = dict(cache_implementation="static", disable_compile=True)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: Stream())


def error(family, batch, run, report, **chunks) -> float:
    """The largest difference of logits to the reference, by the largest logit. chunks: how the reference runs it."""
    if any(layer.kind == "state" for layer in report.layers):
        errors = oracle.short_errors(tiny.build(family), batch, run, report)
    else:
        hides = [hide.rows(run.rows) for hide in oracle.hidden(report, batch["input_ids"].shape[1])]
        dense, _ = oracle.dense_logits(tiny.build(family, "eager"), batch, run.sequences, hides, **chunks)
        errors = (dense - run.logits).abs()
    return float(errors.max() / max(1.0, run.logits.abs().max())) / tiny.found[family].rounding


BATCHES, DECODING = tuple(tiny.BATCHES), tuple(oracle.DECODING)
ROWS = [row for row in product(FAMILIES, KINDS, BATCHES, DECODING) if row[1] == "static" or row[0] in ATTENDING]
FEW = pairwise(FAMILIES, ("static",), BATCHES, DECODING) | pairwise(
    ATTENDING, ("quantised", "offloaded"), BATCHES, DECODING
)


@pytest.mark.parametrize(
    ("family", "kind", "batch", "decoding"),
    [pytest.param(*row, marks=[] if row in FEW else pytest.mark.slow) for row in ROWS],
)
def test_another_cache_equals_the_dense_reference(family, kind, batch, decoding):
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family)
    cache = KINDS[kind](model)
    plain = type(cache)
    run, report = pruned_run(model, "fopru_rank", batch, **oracle.DECODING[decoding], **{tiny.CACHE: cache})
    assert error(family, batch, run, report) < TOLERANCE
    full = [layer for layer in report.layers if not layer.sliding and layer.kind == "self"]
    assert all(layer.kept_length < layer.length for layer in full)
    assert report.kv_bytes < report.kv_bytes_unpruned
    assert type(cache.layers[0]) is type(KINDS[kind](model).layers[0]), "no layer was swapped"
    assert isinstance(cache, plain) and cache.get_seq_length() == run.sequences.shape[1] - 1, "it answers logically"


@pytest.mark.parametrize("family", [*FAMILIES, "llava_windows", "llava_sliding"])
@pytest.mark.parametrize("name", ["divprune", "fopru_row"])
def test_generate_makes_the_static_cache(family, name):
    """Sized and reused by transformers itself, with the masks that it makes ahead; windows are passed by the answer."""
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    for _ in range(2):
        run, report = pruned_run(model, name, batch, **oracle.GREEDY, **STATIC)
        assert error(family, batch, run, report) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in BEFORE_LLM if name != "fopru_rank"])
def test_every_method_before_the_llm_works_with_a_static_cache(name):
    batch, model = tiny.inputs("llava", **tiny.BATCHES["ragged"]), tiny.build("llava")
    run, report = pruned_run(model, name, batch, max_new_tokens=6, **STATIC)
    assert error("llava", batch, run, report) < TOLERANCE


@pytest.mark.parametrize(
    "method", [foveate.get_method("visionzip", keep=0.25), foveate.get_method("pooling", keep=0.25)]
)
def test_merged_tokens_are_those_of_the_other_way(method):
    batch, model = tiny.inputs("llava", **tiny.BATCHES["ragged"]), tiny.build("llava")
    with foveate.prune(model, method):
        expected = oracle.run(model, batch, max_new_tokens=6)
        run = oracle.run(model, batch, max_new_tokens=6, **STATIC)
    assert torch.equal(run.sequences, expected.sequences)
    assert (run.logits - expected.logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_both_ways_are_one_on_the_same_cache(family, batch, attn, monkeypatch):
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family, attn)
    expected, other = pruned_run(model, "fopru_rank", batch, max_new_tokens=8)
    went = []
    monkeypatch.setattr(short, "unfit", lambda cache: "forced")
    monkeypatch.setattr(session, "watch_decoder", lambda forward: (went.append(1), short.watch_decoder(forward)))
    run, report = pruned_run(model, "fopru_rank", batch, max_new_tokens=8)
    if not went:  # transformers made the cache in the model
        pytest.fail("the shorter way was not taken")
    assert torch.equal(run.sequences, expected.sequences)
    assert (run.logits - expected.logits).abs().max() / run.logits.abs().max() < TOLERANCE
    assert report.to_dict() == other.to_dict() and report.images == other.images
    for mine, its in zip(report.layers, other.layers, strict=True):
        assert torch.equal(mine.kept, its.kept) and torch.equal(mine.seen, its.seen)


# Decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "qwen3_5"])
def test_every_step_has_masks_of_one_shape(family):
    """A compiled step is compiled again where its inputs change shape."""
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    shapes = []

    def note(module, args, kwargs):
        masks = kwargs["attention_mask"]
        masks = masks if isinstance(masks, dict) else {"": masks}
        if kwargs["inputs_embeds"].shape[1] == 1:
            shapes.append({name: None if mask is None else tuple(mask.shape) for name, mask in masks.items()})

    handle = tiny.of(model).language_model(model).register_forward_pre_hook(note, with_kwargs=True)
    pruned_run(model, "fopru_rank", batch, max_new_tokens=8, **STATIC)
    handle.remove()
    assert len(shapes) == 7 and all(shape == shapes[0] for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("batch", tiny.BATCHES)
def test_decoding_compiles_once(family, batch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family)
    config = CompileConfig(fullgraph=False, mode=None, backend="eager")
    config._compile_all_devices = True  # transformers compiles on GPUs alone by itself
    compiled = dict(cache_implementation="static", compile_config=config)
    eager, report = pruned_run(model, "fopru_rank", batch, max_new_tokens=8, **STATIC)
    with prune(model, "fopru_rank"):
        run = oracle.run(model, batch, max_new_tokens=8, **compiled)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        again = oracle.run(model, batch, max_new_tokens=12, **compiled)
    assert 0 < graphs <= 4, "few breaks, none in the layers"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * graphs, "at most for another size of cache"
    assert (run.logits - eager.logits).abs().max() < TOLERANCE
    assert (again.logits[:, :8] - eager.logits).abs().max() < TOLERANCE
    assert error(family, batch, run, report) < TOLERANCE


@pytest.mark.parametrize("kind", ["quantised", "offloaded"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_prompt_lookup_is_right_or_refused(family, kind):
    batch, model = tiny.inputs(family, text=(30,)), tiny.build(family)
    batch["input_ids"][:, -10:] = batch["input_ids"][:, -20:-10]
    greedy, _ = pruned_run(model, "fopru_rank", batch, **oracle.GREEDY)
    try:
        lookup, _ = pruned_run(
            model, "fopru_rank", batch, **oracle.GREEDY, prompt_lookup_num_tokens=3, **{tiny.CACHE: KINDS[kind](model)}
        )
    except ValueError as refused:  # transformers: a cache that cannot be cropped
        assert kind == "quantised" and "cache" in str(refused).lower()
        return
    assert torch.equal(lookup.sequences, greedy.sequences)
    assert (lookup.logits - greedy.logits).abs().max() < TOLERANCE


def test_the_first_step_is_not_quantised_yet_and_later_ones_differ_as_they_should():
    batch, model = tiny.inputs("llava", **tiny.BATCHES["ragged"]), tiny.build("llava")
    exact, _ = pruned_run(model, "fopru_rank", batch, **oracle.GREEDY)
    rounded = Cache(layers=[Rounded() for _ in range(layers(model))])
    replay = dict(logits_processor=[oracle.Replay(exact.sequences)])
    run, report = pruned_run(model, "fopru_rank", batch, **oracle.GREEDY, **replay, **{tiny.CACHE: rounded})
    differ = (run.logits - exact.logits).abs().amax((0, 2))
    assert differ[0] < TOLERANCE and 1e-3 < differ[1:].max() < 0.03 * exact.logits.abs().max()
    held = sum(
        t.numel() * t.element_size() for each in rounded.layers for t in each._quantized_keys + each._quantized_values
    )
    assert 0 < report.kv_bytes <= held, "bytes are those of the quantised entries"


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="float8 came with transformers 5.24")
def test_a_float8_cache_answers_like_the_dynamic_one_at_first():
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    exact, _ = pruned_run(model, "fopru_rank", batch, max_new_tokens=4)
    kind = dict(cache_implementation="quantized", cache_config={"backend": "fp8"})
    run, _ = pruned_run(model, "fopru_rank", batch, max_new_tokens=4, **kind)
    assert (run.logits - exact.logits)[:, 0].abs().max() < TOLERANCE
    assert (run.logits - exact.logits)[:, 1:].abs().max() > 1e-3, "quantised at all"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_static_cache_may_be_as_small_as_what_stays(family):
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    run, report = pruned_run(model, "fopru_rank", batch, max_new_tokens=6, **STATIC)
    kept = max(layer.kept_length for layer in report.layers)
    small = static(model, room=kept + 5)
    assert kept + 5 < batch["input_ids"].shape[1], "there would be no room for the prompt"
    again, report = pruned_run(model, "fopru_rank", batch, max_new_tokens=6, **{tiny.CACHE: small})
    assert torch.equal(again.sequences, run.sequences)
    assert error(family, batch, again, report) < TOLERANCE
    smaller = static(model, room=kept - 1)
    with pytest.raises(ValueError, match=f"room for {kept - 1} tokens"):
        pruned_run(model, "fopru_rank", batch, max_new_tokens=2, **{tiny.CACHE: smaller})
    assert type(smaller) is StaticCache, "the refusal left it as it was"


# Turns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.parametrize("image", [True, False])
def test_a_second_turn_equals_the_dense_reference(family, kind, batch, image):
    if kind == "quantised" and family == "gemma3":
        return  # transformers quantises no windows
    batch, model, dense = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family), tiny.build(family, "eager")
    few = dict(suppress_tokens=[tiny.of(model).image_id])
    with prune(model, "fopru_rank") as pruned:
        first = oracle.run(model, batch, max_new_tokens=6, **few, **{tiny.CACHE: KINDS[kind](model)})
        hides = oracle.hidden(pruned.report, batch["input_ids"].shape[1])
        turn = tiny.next_turn(model, batch, first.sequences, image)
        second = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=8)
        hides += oracle.hidden(pruned.report, turn["input_ids"].shape[1])
    _, cache = oracle.dense_logits(dense, batch, first.sequences, hides[: len(hides) // 2])
    errors = oracle.errors(dense, turn | {tiny.CACHE: cache}, second, hides)
    assert errors.max() / max(1.0, second.logits.abs().max()) < TOLERANCE


@pytest.mark.parametrize("name", ["fopru_rank", "divprune"])
@pytest.mark.parametrize("kind", [None, "static"])
def test_a_state_reads_no_fillers_between_tokens(name, kind):
    """Two samples that keep differently many tokens of a later turn cannot share one state's steps."""
    model = tiny.build("lfm2_vl")
    batch = tiny.inputs("lfm2_vl", **tiny.BATCHES["ragged"])
    own = {} if kind is None else {tiny.CACHE: static(model)}
    with prune(model, name):
        first = oracle.run(model, batch, max_new_tokens=4, suppress_tokens=[tiny.of(model).image_id], **own)
        turn = tiny.next_turn(model, batch, first.sequences, image=True)
        with pytest.raises(foveate.UnsupportedError, match="one sample at a time"):
            model.generate(**turn, **{tiny.CACHE: first.cache}, max_new_tokens=4)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("kind", ["static", "quantised"])
def test_a_copied_cache_goes_on_by_itself(kind, make):
    batch, model = tiny.inputs("llava", **tiny.BATCHES["ragged"]), tiny.build("llava")
    with prune(model, "fopru_rank"):
        first = oracle.run(model, batch, max_new_tokens=4, **{tiny.CACHE: KINDS[kind](model)})
        turn = tiny.next_turn(model, batch, first.sequences, image=True)
        copied = make(first.cache)
        one = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=4)
        other = oracle.run(model, turn | {tiny.CACHE: copied}, max_new_tokens=4)
    assert torch.equal(one.logits, other.logits) and copied.get_seq_length() == first.cache.get_seq_length()


def test_a_cache_that_is_reset_is_what_it_was():
    batch, model, cache = tiny.inputs("llava"), tiny.build("llava"), static(tiny.build("llava"))
    plain = oracle.run(model, batch, max_new_tokens=4, **{tiny.CACHE: static(model)})
    with prune(model, "fopru_rank"):
        oracle.run(model, batch, max_new_tokens=4, **{tiny.CACHE: cache})
        assert gaps.is_gapped(cache)
    cache.reset()
    assert type(cache) is StaticCache and not {"index", "gap", "ragged"} & vars(cache).keys()
    assert torch.equal(oracle.run(model, batch, max_new_tokens=4, **{tiny.CACHE: cache}).logits, plain.logits)


def test_a_turn_of_words_leaves_a_cache_what_it_is():
    batch, model, cache = tiny.inputs("llava", images=(0,)), tiny.build("llava"), static(tiny.build("llava"))
    plain = oracle.run(model, batch, max_new_tokens=4, **{tiny.CACHE: static(model)})
    with prune(model, "fopru_rank"):
        run = oracle.run(model, batch, max_new_tokens=4, **{tiny.CACHE: cache})
    assert type(cache) is StaticCache and (run.logits - plain.logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("real", [[[True] * 5, [True] * 5], [[False, False, True, True, True], [True] * 5]])
def test_a_crop_takes_back_positions(real):
    """Of 9 tokens 5 stayed; two came behind them. Against lists."""
    cache = DynamicCache()
    gaps.open_gaps(cache)
    source = torch.tensor([[0, 3, 6, 7, 8], [1, 2, 4, 7, 8]])
    cache.expect(rows.Rows(source, torch.tensor(real), not all(map(all, real))), 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaps.active, "forward", type("Pass", (), {"cache": cache, "inside": False})(), raising=False)
        for new in (5, 1, 1):
            cache.update(torch.zeros(2, 1, new, 4), torch.zeros(2, 1, new, 4), 0)
    held = [
        [*(p if r else -1 for p, r in zip(ps, rs, strict=True)), 9, 10]
        for ps, rs in zip(source.tolist(), real, strict=True)
    ]
    assert cache.positions(0, 7, source.device).tolist() == held and cache.get_seq_length() == 11
    cache.crop(-1)
    assert cache.get_seq_length() == 10 and cache.positions(0, 6, source.device).tolist() == [row[:-1] for row in held]
    cache.crop(-3)  # both samples held the last two of the nine
    assert cache.get_seq_length() == 7 and cache.layers[0].keys.shape[2] == 3
    assert cache.positions(0, 4, source.device).tolist() == [[*row[:3], 7] for row in held], "and what comes goes on"
    with pytest.raises(foveate.UnsupportedError, match="crop"):
        cache.crop(-2)


# Chunks -----------------------------------------------------------------------------------------------------------


@chunked
@pytest.mark.parametrize(
    ("family", "batch", "size", "cache"),
    [
        pytest.param(*row, marks=[] if row in few else pytest.mark.slow)
        for factors in [(FAMILIES, BATCHES, (7, 16), ("dynamic", *KINDS))]
        for few in [pairwise(*factors)]
        for row in product(*factors)
        if row[3] in ("dynamic", "static") or row[0] in ATTENDING
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_prompt_in_chunks_equals_the_dense_reference_in_chunks(family, batch, size, cache):
    """Where a mask looks ahead, transformers itself cuts it at the border of a chunk; the reference does, too."""
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family)
    own = {} if cache == "dynamic" else {tiny.CACHE: KINDS[cache](model)}
    asked = dict(max_new_tokens=8, prefill_chunk_size=size)
    with prune(model, "fopru_rank") as pruned:
        try:
            run = oracle.run(model, batch, **asked, **own)
        except foveate.UnsupportedError as refused:
            hybrid = family in ("qwen3_5", "lfm2_vl") and "one sample at a time" in str(refused)
            assert hybrid or (family == "gemma3" and cache == "static" and "windows" in str(refused))
            return
        report = pruned.report
    assert error(family, batch, run, report, prefill_chunk_size=size) < TOLERANCE
    _, other = pruned_run(model, "fopru_rank", batch, max_new_tokens=1)
    assert report.images == other.images, "the choice is that of the whole prompt"
    assert all(torch.equal(a.kept, b.kept) for a, b in zip(report.layers, other.layers, strict=True))


@chunked
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_chunks_and_beams(family):
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    run, report = pruned_run(model, "fopru_rank", batch, **oracle.BEAMS, prefill_chunk_size=16)
    assert error(family, batch, run, report) < TOLERANCE


@chunked
def test_a_second_turn_in_chunks():
    batch, model, dense = (
        tiny.inputs("llava", **tiny.BATCHES["ragged"]),
        tiny.build("llava"),
        tiny.build("llava", "eager"),
    )
    with prune(model, "fopru_rank") as pruned:
        first = oracle.run(model, batch, max_new_tokens=6, prefill_chunk_size=16, suppress_tokens=[tiny.IMAGE])
        hides = oracle.hidden(pruned.report, batch["input_ids"].shape[1])
        turn = tiny.next_turn(model, batch, first.sequences, image=True)
        second = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=6, prefill_chunk_size=16)
        later = pruned.report
    _, cache = oracle.dense_logits(dense, batch, first.sequences, hides)
    hides += oracle.hidden(later, turn["input_ids"].shape[1])
    assert later.image_tokens and all(sample for sample in later.images), "the report is of the new pictures"
    assert oracle.errors(dense, turn | {tiny.CACHE: cache}, second, hides).max() < TOLERANCE


@pytest.mark.parametrize("name", ["fastv", "plphp"])
def test_methods_that_choose_later_refuse_chunks(name):
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    with prune(model, name) as pruned:
        with pytest.raises(foveate.UnsupportedError, match=r"at the end of the prompt.*prefill_chunk_size"):
            model.generate(**batch, max_new_tokens=2, prefill_chunk_size=16)
        assert pruned.report is None
        model.generate(**tiny.inputs("llava", images=(0,), text=(30,)), max_new_tokens=2, prefill_chunk_size=16)


@pytest.mark.skipif(SLICES_ENCODED, reason="this release keeps the pictures of a prompt in chunks")
def test_releases_that_lose_pictures_in_chunks_are_refused():
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    with prune(model, "fopru_rank"), pytest.raises(foveate.UnsupportedError, match="loses the pictures"):
        model.generate(**batch, max_new_tokens=2, prefill_chunk_size=16)


# What must not be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [STATIC, dict(prefill_chunk_size=16)], ids=["static", "chunks"])
def test_keep_everything_is_the_untouched_model(family, kind):
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    try:
        plain = oracle.run(model, batch, **oracle.GREEDY, **kind)
    except ValueError:
        return
    with prune(model, "random", keep=1.0) as pruned:
        run, report = oracle.run(model, batch, **oracle.GREEDY, **kind), pruned.report
    assert torch.equal(run.logits, plain.logits)
    assert report is None or report.kv_bytes == report.kv_bytes_unpruned


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["fastv", "plphp"])
def test_methods_that_evict_say_what_does_not(kind, name):
    model = tiny.build("llava")
    with prune(model, name), pytest.raises(foveate.UnsupportedError, match="Methods before the LLM work with it"):
        model.generate(**tiny.inputs("llava"), max_new_tokens=2, **{tiny.CACHE: KINDS[kind](model)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_with_gaps_is_of_no_use_outside_the_block(kind):
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    with prune(model, "fopru_rank"):
        first = oracle.run(model, batch, max_new_tokens=4, **{tiny.CACHE: KINDS[kind](model)})
    turn = tiny.next_turn(model, batch, first.sequences)
    with pytest.raises(foveate.UnsupportedError, match="only works while the model is pruned"):
        model.generate(**turn, max_new_tokens=4, **{tiny.CACHE: first.cache})


def test_flash_attention_is_refused_with_these_caches():
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    with prune(model, "divprune"):
        model.model.language_model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(foveate.UnsupportedError, match="flash attention reads as several samples"):
            model(**batch, **{tiny.CACHE: static(model)})


def test_a_mask_of_ones_own_is_refused():
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    length = batch["input_ids"].shape[1]
    batch["attention_mask"] = torch.ones(1, 1, length, 160, dtype=torch.bool).tril()
    with prune(model, "fopru_rank"), pytest.raises(foveate.UnsupportedError, match="2-D attention mask"):
        model(**batch, **{tiny.CACHE: static(model)})


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_forward_by_hand_goes_on(family):
    batch, model = tiny.inputs(family), tiny.build(family)
    run, _ = pruned_run(model, "fopru_rank", batch, max_new_tokens=6)
    with prune(model, "fopru_rank"):
        out = model(**batch, use_cache=True, **{tiny.CACHE: static(model)})
        for step, token in enumerate(run.sequences[0, batch["input_ids"].shape[1] :]):
            assert (out.logits[:, -1] - run.logits[:, step]).abs().max() < TOLERANCE
            out = model(input_ids=token[None, None], **{tiny.CACHE: getattr(out, tiny.CACHE)}, use_cache=True)


# Negative controls: the reference sees each of these.


def closed_up(model):
    """Let the decoder count the tokens that stay."""

    def renumber(module, args, kwargs):
        positions = kwargs["position_ids"]
        if positions.shape[-1] > 1:
            kwargs["position_ids"] = torch.arange(positions.shape[-1]).expand_as(positions)
        return args, kwargs

    rotary = tiny.of(model).language_model(model).rotary_emb
    return rotary.register_forward_pre_hook(renumber, with_kwargs=True)


def test_positions_that_are_closed_up_are_seen():
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    handle = closed_up(model)
    run, report = pruned_run(model, "fopru_rank", batch, max_new_tokens=4, **STATIC)
    handle.remove()
    assert error("llava", batch, run, report) > 10 * TOLERANCE


@pytest.mark.parametrize("kind", ["static", "offloaded"])
def test_fillers_that_are_not_hidden_are_seen(kind, monkeypatch):
    batch, model = tiny.inputs("llava", **tiny.BATCHES["ragged"]), tiny.build("llava")
    own = KINDS[kind](model)
    positions = gaps.Gapped.positions

    def shown(self, first, slots, device):
        found = positions(self, first, slots, device)
        # In the place of the first token that its sample holds.
        return found.where(found >= 0, found.where(found >= 0, 999).amin(1, keepdim=True)) if slots else found

    _, report = pruned_run(model, "fopru_rank", batch, max_new_tokens=4)
    monkeypatch.setattr(gaps.Gapped, "positions", shown)
    run, _ = pruned_run(model, "fopru_rank", batch, max_new_tokens=4, **{tiny.CACHE: own})
    assert error("llava", batch, run, report) > 10 * TOLERANCE
