"""Methods with a guide: what it looks at, what the large model then drops, and answers that need no large model."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import threading

import oracle
import pytest
import tiny
import torch
from cases import TOLERANCE, image_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Hide, hidden, seen_and_kept
from slow import groups_of, layer_tokens, slow_topk
from test_flash import flash, flash_model  # noqa: F401
from traces import changes, snapshot
from transformers import DynamicCache, TextStreamer

import foveate
from foveate.methods.base import token_budget
from foveate.methods.sgl import SGL, confidence, consistency, guided_tokens

families = pytest.mark.parametrize("family", tiny.CORE_DECODERS)
batches = pytest.mark.parametrize("batch", tiny.BATCHES)
backends = pytest.mark.parametrize("attn", ["eager", "sdpa"])


def guide_of(family: str, attn: str = "sdpa"):
    """A model with other weights and a layer less."""
    model = tiny.build(family, attn, seed=5)
    decoder = model.model.language_model
    decoder.layers = decoder.layers[:3]
    decoder.config.num_hidden_layers = 3
    return model


def sgl(family: str, **options) -> SGL:
    return SGL(**{"guide": guide_of(family), "keep": 0.5, "layer": 2} | options)


def ending_answers(guide, batch: dict, steps: int = 8) -> dict:
    """Settings under which the rows' greedy answers end at different steps."""
    answers = guide.generate(**batch, max_new_tokens=steps, do_sample=False)[:, batch["input_ids"].shape[1] :]
    return {"max_new_tokens": steps, "do_sample": False, "eos_token_id": [int(a[i + 2]) for i, a in enumerate(answers)]}


def answer_length(answer: list[int], ends: list[int]) -> int:
    """Tokens up to the first end, it included."""
    return next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))


def rows_alone(family: str, spec: dict) -> list[dict]:
    """Each sample of `tiny.inputs(family, **spec)` as an unpadded batch of its own."""
    batch = tiny.inputs(family, **spec)
    rows, image, patch = [], 0, 0
    for b, count in enumerate(spec["images"]):
        real = batch["attention_mask"][b].bool()
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        row = {name: batch[name][b : b + 1, real] for name in names if name in batch}
        for name in ("pixel_values", "image_sizes", "image_grid_thw"):
            if name in batch:
                row[name] = batch[name][image : image + count]
        if family == "qwen2_5_vl":
            size = int(row["image_grid_thw"].prod(1).sum())
            row["pixel_values"] = batch["pixel_values"][patch : patch + size]
            patch += size
        image += count
        rows.append(row)
    return rows


@torch.no_grad()
def slow_guidance(guide, row: dict, ends: list[int], **settings) -> list[float]:
    """What each token of one unpadded prompt receives, from the eager maps that `generate` returns."""
    out = guide.generate(**row, **settings, output_attentions=True, return_dict_in_generate=True)
    ids = row["input_ids"][0].tolist()
    answer = out.sequences[0, len(ids) :].tolist()
    received = [0.0] * len(ids)
    first = ids.index(tiny.IMAGE)
    for step in range(answer_length(answer, ends)):
        for layer in out.attentions[step]:
            rows = [q for q in range(first, len(ids)) if ids[q] != tiny.IMAGE] if step == 0 else [0]
            for q in rows:
                for k in range(len(ids)):
                    received[k] += float(layer[0, :, q, k].sum())
    return received


@pytest.fixture
def seen(monkeypatch) -> list:
    """The tokens that `select` and `probe` were asked about."""
    calls = []
    original = SGL._top

    def noting(self, tokens, keep):
        calls.append(tokens)
        return original(self, tokens, keep)

    monkeypatch.setattr(SGL, "_top", noting)
    return calls


# The large model ---------------------------------------------------------------------------


@families
@batches
@backends
@pytest.mark.parametrize("decoding", ["greedy", "beams"])
def test_logits_equal_the_dense_reference(family, batch, decoding, attn):
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family, attn)
    with foveate.prune(model, sgl(family), record=True) as pruned:
        run = oracle.run(model, batch, **oracle.DECODING[decoding])
    layers = [layer.kept_length < layer.length for layer in pruned.report.layers]
    assert layers == [False, False, True, True]
    hides = hidden(pruned.report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() < TOLERANCE


@families
@batches
def test_what_stays_is_what_the_guide_looked_at(family, batch, seen):
    spec = tiny.BATCHES[batch]
    batch, model = tiny.inputs(family, **spec), tiny.build(family)
    with foveate.prune(model, sgl(family), record=True) as pruned:
        model.generate(**batch, max_new_tokens=5, do_sample=False)
    (tokens,) = seen
    kept = pruned.report.layers[-1].kept[:, 0]
    for i, row in enumerate(tokens.groups.row.tolist()):
        at = [p for p in tokens.groups.positions[i].tolist() if p >= 0]
        pinned = int(tokens.groups.pinned[i])
        budget = max(1, token_budget(0.5, len(at) + pinned) - pinned)
        assert kept[row, at].tolist() == slow_topk(tokens.guidance[i, tokens.groups.present[i]].tolist(), budget)


@families
@batches
def test_guidance_is_the_sum_of_the_guides_own_maps(family, batch, seen):
    """Layers, heads, text rows and generated tokens, each sample alone; answers of a batch end one by one."""
    spec = tiny.BATCHES[batch]
    batch, model, guide = tiny.inputs(family, **spec), tiny.build(family), guide_of(family)
    settings = ending_answers(guide, batch)
    with foveate.prune(model, sgl(family, guide=guide)):
        model.generate(**batch, **settings)
    (tokens,) = seen
    eager = guide_of(family, "eager")
    slow = [slow_guidance(eager, row, settings["eos_token_id"], **settings) for row in rows_alone(family, spec)]
    for i, row in enumerate(tokens.groups.row.tolist()):
        padding = batch["input_ids"].shape[1] - len(slow[row])
        at = tokens.groups.positions[i][tokens.groups.present[i]]
        expected = torch.tensor(slow[row])[at - padding]
        assert torch.allclose(tokens.guidance[i, tokens.groups.present[i]], expected, atol=1e-4, rtol=1e-5)
        assert tokens.guidance[i, ~tokens.groups.present[i]].isneginf().all()


def test_the_default_layer_is_a_share_of_the_depth():
    guide = guide_of("llava")
    assert [SGL(guide=guide).stages(depth) for depth in (2, 4, 10, 32, 40, 80)] == [
        (1,),
        (1,),
        (3,),
        (9,),
        (12,),
        (24,),
    ]
    assert SGL(guide=guide, layer=7).stages(32) == (7,)


@families
def test_sampled_beams_keep_what_their_sample_keeps(family):
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    with foveate.prune(model, sgl(family), record=True) as pruned:
        model.generate(**batch, max_new_tokens=oracle.STEPS, do_sample=False)
        one = pruned.report.layers[-1].kept
        run = oracle.run(model, batch, **oracle.BEAM_SAMPLE)
    assert torch.equal(pruned.report.layers[-1].kept, one.repeat_interleave(3, dim=0))
    hides = hidden(pruned.report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() < TOLERANCE


@families
@pytest.mark.parametrize("other", ["fopru", "plphp"])
def test_other_places_go_together(family, other):
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    with foveate.prune(model, [foveate.get_method(other, keep=0.6), sgl(family)], record=True) as pruned:
        run = oracle.run(model, batch, **oracle.GREEDY)
    hides = seen_and_kept(pruned.report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() < TOLERANCE


@families
@batches
@pytest.mark.parametrize("options", [{}, {"exit_threshold": 1.0}], ids=["", "exit"])
def test_keeping_everything_changes_nothing_at_all(family, batch, options):
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family)
    untouched = model.generate(**batch, max_new_tokens=12, do_sample=False)
    with foveate.prune(model, sgl(family, keep=1.0, **options)) as pruned:
        assert torch.equal(model.generate(**batch, max_new_tokens=12, do_sample=False), untouched)
    assert (pruned.guided is None) == (not options), "without an exit the guide is not even asked"
    assert pruned.report.kv_bytes == pruned.report.kv_bytes_unpruned


@families
def test_guide_of_another_precision(family):
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    guide = guide_of(family).to(torch.bfloat16)
    with foveate.prune(model, sgl(family, guide=guide, exit_threshold=1.0), record=True) as pruned:
        model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert pruned.report.layers[-1].kept_length < pruned.report.layers[-1].length
    assert pruned.guided.scores.isfinite().all()


def test_a_prompt_without_an_image_does_not_ask_the_guide():
    model = tiny.build("llava")
    text = tiny.inputs("llava", images=(0,))
    expected = model.generate(**text, max_new_tokens=4, do_sample=False)
    with foveate.prune(model, sgl("llava", exit_threshold=0.0)) as pruned:
        assert torch.equal(model.generate(**text, max_new_tokens=4, do_sample=False), expected)
        assert pruned.guided is None
        # A turn in words after an image needs no guide either.
        batch = tiny.inputs("llava")
    with foveate.prune(model, sgl("llava"), record=True) as pruned:
        first = oracle.run(model, batch, max_new_tokens=4)
        asked = pruned.guided
        turn = tiny.next_turn(model, batch, first.sequences)
        oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=4)
        assert pruned.guided is asked


def test_threads_share_a_guide():
    model, batch = tiny.build("llava"), [tiny.inputs("llava", seed=s) for s in range(4)]
    with foveate.prune(model, sgl("llava")):
        alone = [model.generate(**b, max_new_tokens=6, do_sample=False) for b in batch]
        together: list = [None] * 4

        def run(i: int) -> None:
            together[i] = model.generate(**batch[i], max_new_tokens=6, do_sample=False)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


# Early exit ----------------------------------------------------------------------------


@families
@batches
def test_a_trusted_answer_is_the_guides_own(family, batch):
    batch, model, guide = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family), guide_of(family)
    settings = ending_answers(guide, batch)
    expected = guide.generate(**batch, **settings)
    forwards = []
    model.register_forward_pre_hook(lambda module, args: forwards.append(1))
    with foveate.prune(model, sgl(family, guide=guide, exit_threshold=0.0)) as pruned:
        assert torch.equal(model.generate(**batch, **settings), expected)
        assert pruned.guided.exited and pruned.report is None and not forwards
        assert torch.equal(pruned.guided.sequences, expected)
        scores = pruned.guided.scores
    lowest, options = float(scores.min()), {"guide": guide}
    with foveate.prune(model, sgl(family, exit_threshold=lowest, **options)):
        assert torch.equal(model.generate(**batch, **settings), expected), "reaching the threshold is enough"
    with foveate.prune(model, sgl(family, exit_threshold=math.nextafter(lowest, 1) + 1e-6, **options)) as pruned:
        said = model.generate(**batch, **settings)
        assert not pruned.guided.exited and pruned.report.images and forwards
    with foveate.prune(model, sgl(family, **options)) as pruned:
        assert torch.equal(model.generate(**batch, **settings), said)
        assert pruned.guided.scores is None


@families
@batches
@backends
def test_scores_equal_the_dense_reference(family, batch, attn, seen):
    """Confidence from the guide's own logits, consistency from logits with the other image tokens hidden."""
    spec = tiny.BATCHES[batch]
    batch, model, guide = tiny.inputs(family, **spec), tiny.build(family), guide_of(family, attn)
    settings = ending_answers(guide, batch)
    with foveate.prune(model, sgl(family, guide=guide, exit_threshold=0.0, consistency_keep=0.2)) as pruned:
        sequences = model.generate(**batch, **settings)
    (tokens,) = seen
    gone = image_tokens(batch).clone()
    for i, row in enumerate(tokens.groups.row.tolist()):
        guidance = tokens.guidance[i, tokens.groups.present[i]].tolist()
        pinned = int(tokens.groups.pinned[i])
        stays = slow_topk(guidance, max(1, token_budget(0.2, len(guidance) + pinned) - pinned))
        for at, stay in zip(tokens.groups.positions[i][tokens.groups.present[i]].tolist(), stays, strict=True):
            gone[row, at] = not stay
    candidates = torch.zeros_like(gone)
    candidates[tokens.groups.row[:, None].expand_as(tokens.groups.positions)[tokens.groups.present],
               tokens.groups.positions[tokens.groups.present]] = True  # fmt: skip
    gone &= candidates  # newline tokens always stay
    dense, prompt = guide_of(family, "eager"), batch["input_ids"].shape[1]
    answers = sequences[:, prompt:]
    hides = [Hide(layer, gone[:, None]) for layer in range(3)]
    probabilities = []
    for hide in ([], hides):
        logits, _ = oracle.dense_logits(dense, batch, sequences, hide)
        probabilities.append(logits.softmax(-1).gather(-1, answers[..., None])[..., 0].tolist())
    for b, answer in enumerate(answers.tolist()):
        length = answer_length(answer, settings["eos_token_id"])
        sure, checked = (math.prod(p[b][:length]) for p in probabilities)
        assert float(pruned.guided.scores[b]) == pytest.approx((sure ** (1 / length) + checked) / 2, abs=1e-5)


@families
@batches
def test_scores_under_flash_are_the_same(family, batch, flash):  # noqa: F811
    """The check of an answer runs on a prompt with gaps in its positions."""
    batch, scores = tiny.inputs(family, **tiny.BATCHES[batch]), []
    for guide in (tiny.build(family, seed=5), flash_model(family)):
        guide.load_state_dict(tiny.build(family, seed=5).state_dict())
        model = tiny.build(family)
        with foveate.prune(model, sgl(family, guide=guide, exit_threshold=0.0)) as pruned:
            model.generate(**batch, max_new_tokens=4, do_sample=False)
        scores.append(pruned.guided.scores)
    assert flash.lengths and torch.allclose(*scores, atol=1e-5)


def test_a_sure_sample_does_not_answer_for_an_unsure_one():
    family, batch = "llava", tiny.inputs("llava", **tiny.BATCHES["ragged"])
    model, method = tiny.build(family), sgl(family, exit_threshold=0.0)
    with foveate.prune(model, method) as pruned:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    middle = float(pruned.guided.scores.sort().values[1])
    with foveate.prune(model, sgl(family, guide=method.guide, exit_threshold=middle)) as pruned:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert not pruned.guided.exited and pruned.report is not None


# Refusals -----------------------------------------------------------------------------------


def unlike(change):
    model = tiny.build("llava", seed=5)
    change(model)
    return model


def other_image_token(model):
    model.config.image_token_id = 94


GUIDES = {
    "keeps no": (lambda model: tiny.build("qwen2_5_vl"), "qwen2_5_vl"),
    "itself": (lambda model: model, "itself"),
    "no model": (lambda model: "small", "str"),
    "a part": (lambda model: tiny.build("llava").model, "generate"),
    "other tokens": (lambda model: unlike(other_image_token), "94"),
}


@pytest.mark.parametrize("case", GUIDES)
def test_guides_that_cannot_guide_are_refused(case):
    make, told = GUIDES[case]
    model = tiny.build("llava")
    guide = make(model)
    before = snapshot(model)
    with pytest.raises(foveate.UnsupportedError, match=told):
        foveate.prune(model, foveate.SGL(guide=guide))
    assert changes(before, snapshot(model)) == []


def test_without_a_guide_there_is_no_method():
    with pytest.raises(ValueError, match=r"foveate\.SGL\(guide=small_model\)"):
        foveate.SGL()
    with pytest.raises(ValueError, match="guide"):
        foveate.prune(tiny.build("llava"), "sgl", keep=0.5)
    for options, told in (
        (dict(exit_threshold=1.1), r"exit_threshold .*\[0, 1\]"),
        (dict(consistency_keep=0.0), "keep"),
        (dict(layer=0), "layer"),
    ):
        with pytest.raises(ValueError, match=told):
            foveate.SGL(guide=object(), **options)


def test_a_guide_that_encodes_images_to_other_tokens_is_refused():
    model, guide = tiny.build("llava_cls"), tiny.build("llava", seed=5)
    with foveate.prune(model, foveate.SGL(guide=guide)), pytest.raises(foveate.UnsupportedError, match=r"36 .* 37"):
        model.generate(**tiny.inputs("llava_cls"), max_new_tokens=2)


def test_a_pruned_guide_is_refused_and_not_disturbed():
    model, guide, batch = tiny.build("llava"), guide_of("llava"), tiny.inputs("llava")
    with foveate.prune(guide, "fastv") as own:
        expected = guide.generate(**batch, max_new_tokens=4, do_sample=False)
        with pytest.raises(foveate.UnsupportedError, match=r"guide of sgl.*pruned already"):
            foveate.prune(model, foveate.SGL(guide=guide))
    with foveate.prune(model, foveate.SGL(guide=guide)):
        with foveate.prune(guide, "fastv") as own:
            with pytest.raises(foveate.UnsupportedError, match=r"remove\(\)"):
                model.generate(**batch, max_new_tokens=4, do_sample=False)
            assert torch.equal(guide.generate(**batch, max_new_tokens=4, do_sample=False), expected)
            assert own.report is not None
        model.generate(**batch, max_new_tokens=4, do_sample=False)


def test_a_plain_forward_is_refused():
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    with foveate.prune(model, sgl("llava")):
        with pytest.raises(foveate.UnsupportedError, match=r"generate\(\)"):
            model(**batch)
        model.generate(**batch, max_new_tokens=2)
        with pytest.raises(foveate.UnsupportedError, match=r"generate\(\)"):
            model(**batch)


def test_a_new_image_in_a_cached_conversation_is_refused():
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    with foveate.prune(model, sgl("llava")):
        first = oracle.run(model, batch | {tiny.CACHE: DynamicCache()}, max_new_tokens=4)
        turn = tiny.next_turn(model, batch, first.sequences, image=True)
        with pytest.raises(foveate.UnsupportedError, match="whole conversation"):
            model.generate(**turn, **{tiny.CACHE: first.cache}, max_new_tokens=2)


class Printer(TextStreamer):
    def __init__(self):
        pass


MODES = [
    dict(num_beams=2),
    dict(do_sample=True),
    dict(return_dict_in_generate=True),
    dict(do_sample=True, num_return_sequences=2),
    dict(streamer=Printer()),
    {tiny.CACHE: DynamicCache()},
    dict(logits_processor=[lambda ids, scores: scores]),
    dict(stopping_criteria=[lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool)]),
    dict(prefix_allowed_tokens_fn=lambda row, ids: [3]),
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: ",".join(mode))
def test_modes_in_which_the_guide_cannot_answer_are_refused_with_an_exit(mode):
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    with foveate.prune(model, sgl("llava", exit_threshold=0.5)) as pruned:
        with pytest.raises(foveate.UnsupportedError, match=list(mode)[-1]):
            model.generate(**batch, max_new_tokens=2, **mode)
        assert pruned.guided is None, "the guide was not asked"
    if "streamer" not in mode:
        with foveate.prune(model, sgl("llava")):
            model.generate(**batch, max_new_tokens=2, **mode)


# Leaving no trace ----------------------------------------------------------------------------


@families
@pytest.mark.parametrize("threshold", [None, 0.0, 1.0])
def test_large_model_and_guide_are_as_they_were(family, threshold):
    batch, model, guide = tiny.inputs(family), tiny.build(family), guide_of(family)
    expected = model.generate(**batch, max_new_tokens=3), guide.generate(**batch, max_new_tokens=3)
    before = snapshot(model), snapshot(guide)
    with foveate.prune(model, sgl(family, guide=guide, exit_threshold=threshold)):
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        left = changes(before[1], snapshot(guide))
        assert left == ["AttentionInterface: class"], "shadowed while any model is pruned; the guide itself is free"
    assert changes(before[0], snapshot(model)) == changes(before[1], snapshot(guide)) == []
    assert torch.equal(model.generate(**batch, max_new_tokens=3), expected[0])
    assert torch.equal(guide.generate(**batch, max_new_tokens=3), expected[1])


@pytest.mark.parametrize("where", ["guide", "checking", "model"])
def test_an_exception_leaves_no_state(where):
    batch, model, guide = tiny.inputs("llava"), tiny.build("llava"), guide_of("llava")
    method = sgl("llava", guide=guide, exit_threshold=1.0)
    oracle.run(model, batch, max_new_tokens=2), oracle.run(guide, batch, max_new_tokens=2)
    before = snapshot(model), snapshot(guide)

    class Stop(Exception):
        pass

    calls = []

    def stop(module, args, output):
        calls.append(1)
        if where != "checking" or len(calls) == 4:  # after the answer's own three forwards
            raise Stop

    with foveate.prune(model, method):
        expected = model.generate(**batch, max_new_tokens=3, do_sample=False)
        part = model if where == "model" else guide
        handle = part.model.language_model.layers[1].mlp.register_forward_hook(stop)
        with pytest.raises(Stop):
            model.generate(**batch, max_new_tokens=3, do_sample=False)
        handle.remove()
        assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), expected)
    assert changes(before[0], snapshot(model)) == changes(before[1], snapshot(guide)) == []


def test_the_guide_does_not_travel(tmp_path):
    guide = guide_of("llava")
    method = foveate.SGL(guide=guide, keep=0.4, exit_threshold=0.7)
    assert "guide" not in method.to_dict() and json.dumps(method.to_dict())
    assert len(repr(method)) < 200
    method.save_pretrained(tmp_path)
    for load in (lambda: SGL.from_pretrained(tmp_path), lambda: SGL.from_dict(method.to_dict())):
        with pytest.raises(ValueError, match="saved configuration holds none"):
            load()
    again = foveate.Method.from_dict({**method.to_dict(), "guide": guide})
    assert again == method and again.guide is guide
    assert copy.copy(method).guide is guide


# Maths --------------------------------------------------------------------------------------

logs = st.lists(st.floats(-8, 0), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.lists(logs, min_size=1, max_size=4))
def test_exit_scores_are_those_of_each_answer_alone(rows):
    width = max(map(len, rows))
    sure = torch.tensor([row + [-3.0] * (width - len(row)) for row in rows])
    real = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    checked = sure * 1.5
    scores = foveate.SGL(guide=object()).exit_score(sure, checked, real)
    for b, row in enumerate(rows):
        mean = math.exp(sum(row) / len(row))
        product = math.exp(sum(1.5 * x for x in row))
        assert float(confidence(sure, real)[b]) == pytest.approx(mean, rel=1e-4)
        assert float(consistency(checked, real)[b]) == pytest.approx(product, rel=1e-4, abs=1e-7)
        assert float(scores[b]) == pytest.approx((mean + product) / 2, rel=1e-4)


coarse = st.lists(st.integers(0, 3).map(float), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(coarse, min_size=1, max_size=4), st.one_of(st.integers(1, 100).map(lambda p: p / 100), st.integers(1, 20))
)
def test_selection_takes_the_most_guided_and_the_earlier_of_equals(images, keep):
    width = max(map(len, images))
    guidance = torch.tensor([image + [-math.inf] * (width - len(image)) for image in images])
    none = torch.zeros(len(images), 1, 1, 1)
    groups = groups_of([len(image) for image in images])
    tokens = dataclasses.replace(layer_tokens(none, none, 1.0), groups=groups, guidance=guidance)
    kept = foveate.SGL(guide=object(), keep=keep).select(tokens)
    for image, mask in zip(images, kept.tolist(), strict=True):
        assert mask == slow_topk(image, token_budget(keep, len(image))) + [False] * (width - len(image))
    budget = torch.tensor([token_budget(keep, len(image)) for image in images])
    assert torch.equal(guided_tokens(guidance, budget), kept)
