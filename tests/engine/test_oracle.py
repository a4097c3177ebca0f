"""Every method on every family equals the dense reference that hides the same keys; mistakes do not."""

from __future__ import annotations

import json
from itertools import product

import oracle
import pytest
import tiny
import torch
from cases import BEFORE_LLM, FITS, IN_CROSS_ATTENTION, METHODS, PLACES, TOLERANCE, image_tokens, prune, pruned_run
from oracle import Hide, hidden
from sampling import pairwise

import foveate

BACKENDS = ["eager", "sdpa"]
FAR = 1e-2  # what a wrong mask costs at least; a hundred times the tolerance

fits = pytest.mark.parametrize(("family", "name"), FITS)
places = pytest.mark.parametrize(("family", "name"), PLACES)
batches = pytest.mark.parametrize("batch", tiny.BATCHES)
backends = pytest.mark.parametrize("attn", BACKENDS)


def everywhere(enough=None):
    """All of family, method, batch, decoding and backend; beyond one method a place, what is not `enough` is slow.

    enough: by default a choice in which any two of them meet.
    """
    factors = FITS, list(tiny.BATCHES), list(oracle.DECODING), BACKENDS
    few, cases = pairwise(*factors), []
    for (family, name), batch, decoding, attn in product(*factors):
        wanted = ((family, name), batch, decoding, attn) in few if enough is None else enough(batch, decoding, attn)
        slow = (family, name) not in PLACES and not wanted
        cases.append(pytest.param(family, name, batch, decoding, attn, marks=[pytest.mark.slow] if slow else []))
    return pytest.mark.parametrize(("family", "name", "batch", "decoding", "attn"), cases)


def check(family: str, name: str, batch: dict, attn: str, **kwargs) -> None:
    run, report = pruned_run(tiny.build(family, attn), name, batch, **kwargs)
    assert any(kept < tokens for row in report.images for tokens, kept in row), "nothing was pruned"
    hides = hidden(report, batch["input_ids"].shape[1])
    error = oracle.errors(tiny.build(family, "eager"), batch, run, hides)
    assert error.shape == (oracle.STEPS,)
    assert error.max() < TOLERANCE, [f"{e:.1e}" for e in error.tolist()]


@everywhere()
@pytest.mark.sampled(2)
def test_logits_equal_the_dense_reference(family, name, batch, decoding, attn):
    check(family, name, tiny.inputs(family, **tiny.BATCHES[batch]), attn, **oracle.DECODING[decoding])


@places
@batches
def test_beam_sampling_equals_the_dense_reference(family, name, batch):
    check(family, name, tiny.inputs(family, **tiny.BATCHES[batch]), "sdpa", **oracle.BEAM_SAMPLE)


@places
@backends
def test_images_side_by_side_stay_two_images(family, name, attn):
    """Two images with nothing between them are one run of image tokens, but each keeps its own share."""
    check(family, name, tiny.inputs(family, images=(2,), between=0), attn, **oracle.GREEDY)


@fits
@backends
@pytest.mark.sampled(8)
def test_rows_without_an_image_are_left_alone(family, name, attn):
    batch = tiny.inputs(family, images=(1, 0, 2), text=(3, 6, 4))
    check(family, name, batch, attn, **oracle.GREEDY)


def other_parts():
    factors = (
        [v for v in tiny.VARIANTS if not tiny.found[v].window],
        [n for n in METHODS if n not in IN_CROSS_ATTENTION],
        BACKENDS,
    )
    few = pairwise(*factors)
    return [pytest.param(*case, marks=[] if case in few else [pytest.mark.slow]) for case in product(*factors)]


@pytest.mark.parametrize(("variant", "name", "attn"), other_parts())
@pytest.mark.sampled(2)
def test_other_encoders_and_decoders_equal_the_dense_reference(variant, name, attn):
    """SigLIP without a [CLS] token, CLIP that hands its own on, and decoders other than Llama."""
    check(variant, name, tiny.inputs(variant, **tiny.BATCHES["ragged"]), attn, **oracle.GREEDY)


@places
@batches
@pytest.mark.parametrize("keep", [1, 0.01, 0.99])
@pytest.mark.sampled(5)
def test_extremes_equal_the_dense_reference(family, name, batch, keep):
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family)
    with prune(model, name, keep=keep) as pruned:
        run = oracle.run(model, batch, **oracle.GREEDY)
    hides = hidden(pruned.report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() < TOLERANCE
    if family != "mllama":  # there all images of a sample compete
        assert all(kept >= 1 for row in pruned.report.images for _, kept in row), "no image is lost altogether"


@places
def test_more_tokens_than_there_are_is_all_of_them(family, name):
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    untouched = oracle.run(model, batch, **oracle.GREEDY)
    with prune(model, name, keep=1000):
        assert torch.equal(oracle.run(model, batch, **oracle.GREEDY).logits, untouched.logits)


@fits
@pytest.mark.sampled(8)
def test_half_precision_runs_and_keeping_everything_stays_exact(family, name):
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family).to(torch.bfloat16)
    untouched = oracle.run(model, batch, **oracle.GREEDY)
    with prune(model, name, keep=1.0):
        assert torch.equal(oracle.run(model, batch, **oracle.GREEDY).logits, untouched.logits)
    run, report = pruned_run(model, name, batch, **oracle.GREEDY)
    dense = tiny.build(family, "eager").to(torch.bfloat16)
    hides = hidden(report, batch["input_ids"].shape[1])
    assert oracle.errors(dense, batch, run, hides).max() < 0.3, "three digits are left of numbers up to 4"


@everywhere(lambda batch, decoding, attn: (batch, decoding, attn) == ("ragged", "beams", "sdpa"))
@pytest.mark.sampled(8)
def test_keeping_everything_changes_nothing_at_all(family, name, batch, decoding, attn):
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family, attn)
    untouched = oracle.run(model, batch, **oracle.DECODING[decoding])
    with prune(model, name, keep=1.0) as pruned:
        run = oracle.run(model, batch, **oracle.DECODING[decoding])
    assert all(layer.kept_length == layer.length for layer in pruned.report.layers)
    assert torch.equal(run.sequences, untouched.sequences)
    assert torch.equal(run.logits, untouched.logits)


# What was kept ----------------------------------------------------------------------


@fits
@batches
@pytest.mark.sampled(8)
def test_the_report_describes_the_cache(family, name, batch):
    spec = tiny.BATCHES[batch]
    batch, model = tiny.inputs(family, **spec), tiny.build(family)
    with prune(model, name) as pruned:
        run = oracle.run(model, batch, max_new_tokens=1)
        longer = oracle.run(model, batch, max_new_tokens=4)
        report = pruned.report
    real = batch["attention_mask"].bool()[:, None]
    stored, uneven = 0, getattr(foveate.method_class(METHODS[name][0]), "uneven_heads", False)
    for layer, now, later in zip(report.layers, run.cache.layers, longer.cache.layers, strict=True):
        assert layer.kept_length == now.keys.shape[-2] == now.values.shape[-2]
        assert later.keys.shape[-2] == layer.kept_length + (3 if layer.kind == "self" else 0)
        assert layer.kept.dtype == torch.bool
        assert layer.kept.shape[0] == len(real) and layer.kept.shape[1] in (1, 2)
        assert layer.kept.shape[2] == layer.length
        counts = layer.kept.sum(-1)
        if not uneven:
            assert (counts == counts[:, :1]).all(), "every head of a row keeps as many"
        assert counts.max() <= layer.kept_length <= layer.length
        if layer.kind == "self":
            assert layer.length == batch["input_ids"].shape[1]
            assert not (layer.kept & ~real).any(), "padding is not kept"
            text = real & ~image_tokens(batch)[:, None]
            assert (layer.kept | ~text).all(), "text is always kept"
        if len(real) == 1:
            assert counts.max() == layer.kept_length
        for tensor in (now.keys, now.values, later.keys, later.values):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        stored += (now.keys.numel() + now.values.numel()) * 4
    assert report.kv_bytes == stored < report.kv_bytes_unpruned

    plain = oracle.run(tiny.build(family), batch, max_new_tokens=1)
    assert report.kv_bytes_unpruned == sum(t.numel() * 4 for x in plain.cache.layers for t in (x.keys, x.values))

    images = [[tokens for tokens, _ in row] for row in report.images]
    assert images == tiny.image_counts(family, spec["images"])
    assert all(0 < kept < tokens for row in report.images for tokens, kept in row)
    assert json.loads(json.dumps(report.to_dict()))["kv_bytes"] == stored
    assert "\n" not in str(report) and str(report)


def kept_per_image(report, batch: dict, spec: dict, family: str) -> list[torch.Tensor]:
    """Return for every layer the tokens kept of each image: (heads, images)."""
    counts = tiny.image_counts(family, spec["images"])
    out = []
    for layer in report.layers:
        of_layer = []
        for b, row in enumerate(counts):
            where = image_tokens(batch)[b].nonzero().flatten()
            of_layer += [layer.kept[b, :, part].sum(-1) for part in where.split(row)]
        out.append(torch.stack(of_layer, -1))
    return out


# test_schedules.py counts what each layer of the last four keeps.
LAYERS_DIFFER = (
    "plphp",
    "plphp_fixed",
    "aircache",
    "prefixkv",
    "sparsemm",
    "gsearch",
    "gsearch_none_left",
    "psigmoid",
    "psigmoid_text",
)


@pytest.mark.parametrize(("family", "name"), [f for f in FITS if f[0] != "mllama" and f[1] not in LAYERS_DIFFER])
@batches
@pytest.mark.sampled(5)
def test_each_image_keeps_its_share(family, name, batch):
    spec = tiny.BATCHES[batch]
    batch = tiny.inputs(family, **spec)
    _, report = pruned_run(tiny.build(family), name, batch, max_new_tokens=2)
    tokens = torch.tensor([n for row in tiny.image_counts(family, spec["images"]) for n in row])
    share = METHODS[name][1]["keep"] * tokens
    method = foveate.get_method(METHODS[name][0], **METHODS[name][1])
    stages = method.stages(len(report.layers)) if method.place == "layer" else (0,)
    layers = kept_per_image(report, batch, spec, family)
    for i, kept in enumerate(layers):
        if i < stages[0]:
            assert (kept == tokens).all()
        elif i < stages[-1]:
            assert (kept > share).all() and (kept < tokens).all()
        elif family == "llava_next":  # newline tokens and whole tiles make the share approximate
            assert (kept >= 0.7 * share).all() and (kept <= share + 0.25 * tokens).all()
        else:
            assert (kept == share).all()
    mean = torch.stack([kept[0] for kept in layers[stages[0] :]]).float().mean(0).round()
    assert [kept for row in report.images for _, kept in row] == mean.tolist()


@pytest.mark.parametrize("name", (*BEFORE_LLM, "fastv", "plphp", "pyramiddrop", "sparsevlm", "dart", "topv"))
def test_keep_as_a_number_is_tokens_per_image(name):
    spec = tiny.BATCHES["ragged"]
    batch, model = tiny.inputs("llava", **spec), tiny.build("llava")
    with prune(model, name, keep=12, **({"delta": 0.0} if name == "plphp" else {})) as pruned:
        oracle.run(model, batch, max_new_tokens=2)
    assert (kept_per_image(pruned.report, batch, spec, "llava")[-1] == 12).all()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_fopru_rows_are_whole_rows_of_the_grid(family):
    spec = tiny.BATCHES["ragged"]
    batch = tiny.inputs(family, **spec)
    _, report = pruned_run(tiny.build(family), "fopru_row", batch, max_new_tokens=2)
    layouts = iter(foveate.get_family(family).layouts(tiny.config(family), batch))
    for b, row in enumerate(tiny.image_counts(family, spec["images"])):
        kept = report.layers[0].kept[b, 0][image_tokens(batch)[b]]
        for image in kept.split(row):
            rows = image.view(next(layouts).tiles[0].grid)
            assert (rows.all(1) | ~rows.any(1)).all()


@pytest.mark.parametrize(
    ("alpha", "beta", "share"), [(0.0, 0.0, 0.75), (1.0, 0.0, 0.5), (1.0, 1.0, 0.25)], ids=["+", "=", "-"]
)
@batches
def test_plphp_gives_each_class_of_layers_its_retention(alpha, beta, share, batch):
    """Vision attention lies strictly between 0 and 1, so these thresholds put every layer into one class."""
    spec = tiny.BATCHES[batch]
    batch, model = tiny.inputs("llava", **spec), tiny.build("llava")
    with prune(model, "plphp", keep=0.5, delta=0.25, alpha=alpha, beta=beta, start_layer=1) as pruned:
        oracle.run(model, batch, max_new_tokens=2)
    first, *others = kept_per_image(pruned.report, batch, spec, "llava")
    assert (first == 36).all()
    assert all((kept == share * 36).all() for kept in others)


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
def test_plphp_keeps_other_tokens_in_other_heads(family):
    _, report = pruned_run(tiny.build(family), "plphp", tiny.inputs(family), max_new_tokens=2)
    pruned = [layer for layer in report.layers if layer.kept_length < layer.length]
    assert all(layer.since == "decode" and layer.kept.shape[1] == 2 for layer in pruned)
    assert any((layer.kept[:, 0] != layer.kept[:, 1]).any() for layer in pruned)


@batches
def test_trimmed_llama_keeps_a_union_of_heads_and_no_padded_tile(batch):
    spec = tiny.BATCHES[batch]
    batch = tiny.inputs("mllama", **spec)
    _, report = pruned_run(tiny.build("mllama"), "trimmed_llama", batch, max_new_tokens=2)
    cross = [layer for layer in report.layers if layer.kind == "cross"]
    assert [layer.index for layer in cross] == [1, 3, 5]
    assert [layer.since for layer in cross] == ["decode", "prefill", "prefill"]
    tiles = batch["cross_attention_mask"].any(1).flatten(1).repeat_interleave(17, dim=1)
    for layer in cross:
        assert torch.equal(layer.kept, cross[0].kept), "one choice for all layers"
        assert not (layer.kept[:, 0] & ~tiles).any()
        assert (layer.kept.sum(-1)[:, 0] < tiles.sum(1)).all()
        # four heads choose, so the union may be up to four times the share of one head
        assert (layer.kept.sum(-1)[:, 0] <= 4 * 0.1 * 68 * torch.tensor(spec["images"])).all()
    for layer in report.layers:
        if layer.kind == "self":
            assert layer.kept_length == layer.length


@pytest.mark.parametrize(("family", "name"), [f for f in FITS if f[1] != "random"])
@pytest.mark.sampled(5)
def test_choices_do_not_depend_on_the_batch(family, name):
    """An image keeps the same tokens alone, beside another row, behind padding, and in every beam."""
    alone, model = tiny.inputs(family), tiny.build(family)
    _, report = pruned_run(model, name, alone, max_new_tokens=2)
    wide = {}
    for key, value in alone.items():
        value = torch.cat([value, value])
        if key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            value = torch.nn.functional.pad(value, (3, 0))
        elif key == "cross_attention_mask":
            value = torch.nn.functional.pad(value, (0, 0, 0, 0, 3, 0))
        wide[key] = value
    _, beside = pruned_run(model, name, wide, max_new_tokens=2, num_beams=2)
    for one, many in zip(report.layers, beside.layers, strict=True):
        assert len(many.kept) == 4, "two rows, two beams each"
        assert (many.kept[..., 3 if one.kind == "self" else 0 :] == one.kept).all()


def test_a_mllama_sample_does_not_depend_on_the_rest_of_its_batch():
    """Not even where all features of one of its images are dropped, while another sample keeps more."""
    both, model = tiny.inputs("mllama", images=(0, 2), text=(5, 10)), tiny.build("mllama")
    alone = {k: v[1:] for k, v in both.items()}
    for keep in (0.02, 0.1, 0.3):
        with prune(model, "trimmed_llama", keep=keep):
            together = oracle.run(model, both, max_new_tokens=2)
            single = oracle.run(model, alone, max_new_tokens=2)
        assert (together.logits[1:, 0] - single.logits[:, 0]).abs().max() < TOLERANCE


# Negative controls: each of these is a mistake, and the oracle must see it --------------------


def one_key_more(hides: list[Hide]) -> list[Hide]:
    """Hide in one pruned layer the next key after the first hidden one."""
    for i, hide in enumerate(hides):
        if hide.keys.any() and not hide.keys.all():
            keys = hide.keys.clone()
            first = keys[0].int().argmax(-1)
            for head, at in enumerate(first.tolist()):
                visible = (~keys[0, head, at:]).nonzero()[0] + at
                keys[0, head, visible] = True
            return [*hides[:i], Hide(hide.layer, keys, hide.first_query), *hides[i + 1 :]]
    raise AssertionError("nothing was pruned")


def shifted_by_one(hides: list[Hide]) -> list[Hide]:
    return [Hide(h.layer, h.keys.roll(1, -1), h.first_query) for h in hides]


def heads_exchanged(hides: list[Hide]) -> list[Hide]:
    return [Hide(h.layer, h.keys.flip(1), h.first_query) for h in hides]


MISTAKES = {
    "one key more": one_key_more,
    "shifted by one": shifted_by_one,
    "nothing hidden": lambda hides: [],
    "one layer forgotten": lambda hides: hides[:-1],
}


@places
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.sampled(5)
def test_the_oracle_sees_a_wrong_mask(family, name, mistake):
    batch = tiny.inputs(family, **tiny.BATCHES["one"])
    run, report = pruned_run(tiny.build(family), name, batch, **oracle.GREEDY)
    hides = MISTAKES[mistake](hidden(report, batch["input_ids"].shape[1]))
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() > FAR


@places
def test_the_oracle_sees_a_wrong_time(family, name):
    """Keys hidden from the start are not keys evicted later, and the other way round."""
    batch = tiny.inputs(family, **tiny.BATCHES["one"])
    length = batch["input_ids"].shape[1]
    run, report = pruned_run(tiny.build(family), name, batch, **oracle.GREEDY)
    hides = [Hide(h.layer, h.keys, length - h.first_query) for h in hidden(report, length)]
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() > FAR


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
def test_the_oracle_sees_exchanged_heads(family):
    batch = tiny.inputs(family, **tiny.BATCHES["one"])
    run, report = pruned_run(tiny.build(family), "plphp", batch, **oracle.GREEDY)
    hides = heads_exchanged(hidden(report, batch["input_ids"].shape[1]))
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() > FAR


@places
def test_the_oracle_sees_an_untouched_model(family, name):
    """The logits of an unpruned model are not those of a pruned one."""
    batch, model = tiny.inputs(family, **tiny.BATCHES["one"]), tiny.build(family)
    _, report = pruned_run(model, name, batch, **oracle.GREEDY)
    untouched = oracle.run(model, batch, **oracle.GREEDY)
    hides = hidden(report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, untouched, hides).max() > FAR


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
@pytest.mark.parametrize("name", BEFORE_LLM)
def test_kept_tokens_keep_their_positions(family, name):
    """A second proof for what is dropped before the LLM, and the control with positions closed up."""
    batch, model = tiny.inputs(family), tiny.build(family)
    run, report = pruned_run(model, name, batch, **oracle.GREEDY)
    keep = report.layers[0].kept[0]
    embeds, positions = oracle.embedded(model, batch)
    for where, close in ((positions[..., keep[0]], True), (positions[..., : int(keep.sum())], False)):
        with torch.no_grad():
            short = model.model.language_model(inputs_embeds=embeds[keep][None], position_ids=where)
            error = (model.lm_head(short.last_hidden_state[:, -1]) - run.logits[:, 0]).abs().max()
        assert (error < TOLERANCE) if close else (error > FAR)
