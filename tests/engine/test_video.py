"""Videos, and pictures that are the frames of a clip, against the dense reference; and what cannot be."""

from __future__ import annotations

from itertools import product

import oracle
import pytest
import tiny
import torch
from cases import FITS, METHODS, TOLERANCE, prune, relative_errors
from oracle import Hide, hidden

import foveate

pytestmark = pytest.mark.sampled(8)

FAR = 1e-2  # what a mistake costs at least
# Methods that compare frames; those of the matrix see each frame as a tile.
ACROSS = {
    "evs": dict(keep=0.5),
    "vidcom2": dict(keep=0.25),
    "dycoke": dict(keep=0.5),
    "random_clip": dict(keep=0.25),
    "uniform_frames": dict(keep=0.5),
}
BATCHES = {
    "one": dict(),
    "ragged": dict(videos=(1, 2, 1), text=(4, 9, 2)),  # left-padded
    "mixed": dict(videos=(1, 0, 2), text=(3, 6, 4), images=(1, 2, 0)),  # with images, and a row of images alone
}
SAMPLED = ("fopru_rank", "fopru_cls", "divprune", "fastv", "sparsevlm", "plphp", "csp", "random_layer")
EACH = [name for name in METHODS if ("llava", name) in FITS]
core = pytest.mark.parametrize("family", [name for name in tiny.VIDEO_FAMILIES if name in tiny.CORE])
families = pytest.mark.parametrize("family", tiny.VIDEO_FAMILIES)


def rows(methods, few=()):
    """All methods on all families; beyond the core, and those that are not among the few, slow."""
    out = []
    for number, (family, name) in enumerate(product(tiny.VIDEO_FAMILIES, methods)):
        taken = family in tiny.CORE or number % 3 == 0
        if name in tiny.found[family].refused or (name == "gsearch_none_left" and family not in tiny.CORE):
            continue  # rates for models of four layers
        slow = not taken or (few and name not in few)
        out.append(pytest.param(family, name, marks=[pytest.mark.slow] if slow else []))
    return pytest.mark.parametrize(("family", "name"), out)


def pruned(model, name: str, **options):
    if name in ACROSS:
        return foveate.prune(model, name, record=True, **(ACROSS[name] | options))
    return prune(model, name, **options)


def check(family: str, name: str, batch: dict, attn: str = "sdpa", **decoding):
    model = tiny.build(family, attn)
    with pruned(model, name) as handle:
        run, report = oracle.run(model, batch, **decoding), handle.report
    assert any(kept < tokens for row in report.images for tokens, kept in row), "nothing was pruned"
    error = relative_errors(family, batch, run, report)
    assert error.max() < TOLERANCE, [f"{e:.1e}" for e in error.tolist()]
    return run, report


def counted(family: str, **spec) -> list[list[int]]:
    """Tokens of each video and image, row by row."""
    videos = spec.get("videos", (1,))
    counts = tiny.video_counts(family, videos, spec.get("images"))
    one = tiny.found[family]
    more = [
        [(one.heads * len(row[at]) + one.ends) * (at < n) for at in range(len(row))]
        for row, n in zip(counts, videos, strict=True)
    ]
    return [
        [sum(frames) + beside for frames, beside in zip(*row, strict=True)] for row in zip(counts, more, strict=True)
    ]


# Videos ------------------------------------------------------------------------------------------------------


def spec_of(family: str, batch: str) -> dict:
    """What the batch holds; its images left out where a prompt of the family holds images or videos, not both."""
    return BATCHES[batch if batch != "mixed" or tiny.found[family].mixes else "ragged"]


@rows(ACROSS)
@pytest.mark.parametrize("batch", BATCHES)
def test_methods_that_compare_frames_equal_the_dense_reference(family, name, batch):
    spec = spec_of(family, batch)
    _, report = check(family, name, tiny.videos(family, **spec), **oracle.GREEDY)
    assert [[tokens for tokens, _ in row] for row in report.images] == counted(family, **spec)


@rows(EACH, SAMPLED)
def test_every_other_method_equals_the_dense_reference(family, name):
    check(family, name, tiny.videos(family, **spec_of(family, "mixed")), **oracle.GREEDY)


@core
@pytest.mark.parametrize("name", ["evs", "fopru_rank", "fastv", "plphp"])
@pytest.mark.parametrize("decoding", ["beams", "sample"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_beams_and_samples_equal_the_dense_reference(family, name, decoding, attn):
    check(family, name, tiny.videos(family, **spec_of(family, "mixed")), attn, **oracle.DECODING[decoding])


@families
@pytest.mark.parametrize("name", ["evs", "fopru_rank", "fastv", "plphp"])
def test_keeping_everything_changes_nothing_at_all(family, name):
    batch, model = tiny.videos(family, **spec_of(family, "mixed")), tiny.build(family)
    untouched = oracle.run(model, batch, **oracle.GREEDY)
    with pruned(model, name, keep=1.0):
        run = oracle.run(model, batch, **oracle.GREEDY)
    assert torch.equal(run.sequences, untouched.sequences)
    assert torch.equal(run.logits, untouched.logits)


@core
@pytest.mark.parametrize("name", ["vidcom2", "random_clip", "fopru_rank", "fastv", "plphp"])
def test_an_int_is_tokens_per_frame(family, name):
    spec = BATCHES["ragged"]
    model, batch = tiny.build(family), tiny.videos(family, **spec)
    with pruned(model, name, keep=4, **({"delta": 0.0} if name == "plphp" else {})) as handle:
        oracle.run(model, batch, max_new_tokens=2)
    frames = [[4 * len(each) for each in row] for row in tiny.video_counts(family, spec["videos"])]
    assert [[kept for _, kept in row] for row in handle.report.images] == frames


@core
def test_each_frame_keeps_its_share_of_methods_that_look_at_frames(family):
    model, batch = tiny.build(family), tiny.videos(family)
    with pruned(model, "fopru_rank") as handle:
        oracle.run(model, batch, max_new_tokens=1)
    (tokens,) = handle.report.image_tokens[0]
    kept = handle.report.layers[0].kept[0, 0, tokens.positions]
    frames = tiny.video_counts(family, (1,))[0][0]
    assert [tile.frame for tile in tokens.tiles] == list(range(len(frames)))
    assert [int(kept[tile.index].sum()) for tile in tokens.tiles] == [n // 4 for n in frames]


@core
def test_evs_keeps_what_the_untouched_encoder_says_changed(family):
    """Read from an untouched model, frame by frame."""
    model, batch = tiny.build(family), tiny.videos(family)
    with pruned(model, "evs") as handle:
        oracle.run(model, batch, max_new_tokens=1)
    (tokens,) = handle.report.image_tokens[0]
    kept = handle.report.layers[0].kept[0, 0, tokens.positions]
    names = ("pixel_values_videos", "video_grid_thw")
    features = model.model.get_video_features(*(batch[name] for name in names if name in batch)).pooler_output[0]
    frames = features[: sum(tiny.video_counts(family, (1,))[0][0])].unflatten(0, (len(tokens.tiles), -1))
    change = 1 - torch.cosine_similarity(frames[1:], frames[:-1], dim=-1).flatten()
    gone = ~kept[tokens.tiles[0].grid[0] * tokens.tiles[0].grid[1] :]
    assert change[gone].max() < change[~gone].min()


# Methods without a row in the matrix, each as its own file builds it.
OTHERS = {
    "visionzip": lambda model: foveate.VisionZip(keep=0.5, contextual=0.4),
    "pooling": lambda model: foveate.Pooling(keep=0.25),
    "zipvl": lambda model: foveate.ZipVL(keep=0.5),
    "elastic_cache": lambda model: foveate.ElasticCache(keep=0.5),
    "mint": lambda model: foveate.MINT(keep=0.5, layer=2),
    "sgl": lambda model: foveate.SGL(keep=0.5, layer=2, guide=tiny.build("qwen2_5_vl", seed=1)),
    "videollm_mod": lambda model: foveate.VideoLLMMoD(keep=0.5, router="random", layers=(1, 3)),
    "last_step": lambda model: foveate.LastStep(keep=0.5),
    "running_sum": lambda model: foveate.RunningSum(keep=0.5),
    "pages": lambda model: foveate.Pages(keep=0.5),
    "per_turn": lambda model: foveate.PerTurn(keep=0.5),
    "fastvid": lambda model: foveate.FastVID(keep=0.5),
    "holitom": lambda model: foveate.HoliTom(keep=0.5),
}


@pytest.mark.parametrize("name", [*EACH, *OTHERS])
@pytest.mark.parametrize("decoding", [oracle.GREEDY, oracle.BEAMS], ids=["greedy", "beams"])
def test_a_video_of_one_frame_is_a_picture_to_every_method(name, decoding):
    """The same patches as a picture and as a video: of both a model says the same, and so it does under each method."""
    images = tiny.inputs("qwen2_5_vl", images=(1, 2), text=(4, 7))
    is_image = images["input_ids"] == tiny.IMAGE
    videos = {
        "input_ids": images["input_ids"].masked_fill(is_image, tiny.VIDEO),
        "attention_mask": images["attention_mask"],
        "mm_token_type_ids": 2 * images["mm_token_type_ids"],
        "pixel_values_videos": images["pixel_values"],
        "video_grid_thw": images["image_grid_thw"],
    }
    if name == "mint" and "num_beams" in decoding:
        decoding = {**decoding, "num_beams": 2}
    said = []
    for batch in (images, videos):
        model = tiny.build("qwen2_5_vl")
        method = OTHERS[name](model) if name in OTHERS else foveate.get_method(METHODS[name][0], **METHODS[name][1])
        with foveate.prune(model, method) as handle:
            said.append(oracle.run(model, batch, **decoding))
        said[-1].report = handle.report
    assert torch.equal(said[0].sequences[:, -oracle.STEPS :], said[1].sequences[:, -oracle.STEPS :])
    assert torch.allclose(said[0].logits, said[1].logits, atol=1e-5)
    reports = [run.report.to_dict() for run in said]
    assert reports[0] == reports[1], "kept, and where steps choose, read alike"
    dropped = any(image["kept"] < image["tokens"] for row in reports[1]["images"] for image in row)
    assert dropped or reports[1]["decoding"]["read"] < reports[1]["decoding"]["held"]


@core
@pytest.mark.parametrize("name", ["evs", "fastv", "plphp"])
@pytest.mark.parametrize("brings", ["words", "an image"])
def test_a_second_turn_equals_the_dense_reference(family, name, brings):
    model, batch = tiny.build(family), tiny.videos(family)
    dense = tiny.build(family, "eager")
    with pruned(model, name) as handle:
        first = oracle.run(model, batch, max_new_tokens=6)
        hides = hidden(handle.report, batch["input_ids"].shape[1])
        turn = tiny.next_turn(model, batch, first.sequences, brings == "an image")
        second = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=8)
        later = handle.report
    _, cache = oracle.dense_logits(dense, batch, first.sequences, hides)
    hides += hidden(later, turn["input_ids"].shape[1])
    assert oracle.errors(dense, turn | {tiny.CACHE: cache}, second, hides).max() < TOLERANCE


@core
@pytest.mark.parametrize("name", ["evs", "fastv", "plphp"])
def test_assisted_decoding_says_the_same(family, name):
    model, batch = tiny.build(family), tiny.videos(family)
    with pruned(model, name):
        plain = model.generate(**batch, max_new_tokens=12, do_sample=False)
        assisted = model.generate(**batch, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, assisted)


@core
@pytest.mark.parametrize("name", ["evs", "fastv", "plphp"])
def test_a_plain_forward_keeps_what_generate_keeps(family, name):
    model, batch = tiny.build(family), tiny.videos(family)
    with pruned(model, name) as handle, torch.no_grad():
        first = oracle.run(model, batch, max_new_tokens=1)
        kept = [layer.kept for layer in handle.report.layers]
        logits = model(**batch, logits_to_keep=1).logits[:, -1]
        assert all(torch.equal(a, b.kept) for a, b in zip(kept, handle.report.layers, strict=True))
    assert torch.allclose(logits, first.logits[:, 0], atol=1e-5)


@core
@pytest.mark.parametrize("name", ["evs", "fopru_rank", "fastv", "plphp"])
@pytest.mark.parametrize("mistake", ["shifted by one", "nothing hidden", "one frame more"])
def test_the_oracle_sees_a_wrong_mask(family, name, mistake):
    model, batch = tiny.build(family), tiny.videos(family)
    with pruned(model, name) as handle:
        run = oracle.run(model, batch, **oracle.GREEDY)
    hides = hidden(handle.report, batch["input_ids"].shape[1])
    if mistake == "shifted by one":
        hides = [Hide(h.layer, h.keys.roll(1, -1), h.first_query) for h in hides]
    elif mistake == "nothing hidden":
        hides = []
    else:
        (tokens,) = handle.report.image_tokens[0]
        last = hides[-1].keys.clone()
        last[..., tokens.positions[tokens.tiles[1].index]] = True
        hides = [*hides[:-1], Hide(hides[-1].layer, last, hides[-1].first_query)]
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() > FAR


# Pictures that are the frames of a clip ----------------------------------------------------------------------


FRAMES = ("llava", "llava_next")


def frames_of(family: str, images=(4, 3), text=(4, 7)) -> dict:
    """Rows of pictures, those of a row of one kind where the family has several."""
    batch = tiny.inputs(family, images=images, text=text, between=1)
    if family == "llava":  # a film: only some of each picture changes
        rng = torch.Generator().manual_seed(7)
        change = torch.rand(len(batch["pixel_values"]), 1, 6, 6, generator=rng) < 0.4
        change = change.repeat_interleave(4, 2).repeat_interleave(4, 3)
        batch["pixel_values"] = torch.where(change, batch["pixel_values"], batch["pixel_values"][:1])
    return batch


@pytest.mark.parametrize("name", [*ACROSS, *SAMPLED])
@pytest.mark.parametrize("decoding", [oracle.GREEDY, oracle.BEAMS], ids=["greedy", "beams"])
def test_frames_that_are_pictures_equal_the_dense_reference(name, decoding):
    model, batch = tiny.build("llava"), frames_of("llava")
    with pruned(model, name) as handle, handle.clips([4, 1, 2]):
        run, report = oracle.run(model, batch, **decoding), handle.report
    beams = decoding.get("num_beams", 1)
    assert [[tokens for tokens, _ in row] for row in report.images] == [[144]] * beams + [[36, 72]] * beams
    hides = hidden(report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build("llava", "eager"), batch, run, hides).max() < TOLERANCE


def _others():
    """Every other family whose images sit in the prompt, a method in turn; slow: all of them."""
    names = [name for name in tiny.DECODER_FAMILIES if name != "llava"]
    pairs = list(product(names, ("vidcom2", "evs", "random_clip", "plphp")))
    return [
        pytest.param(family, name, marks=[] if number % 4 == number // 4 % 4 else [pytest.mark.slow])
        for number, (family, name) in enumerate(pairs)
        if name not in tiny.found[family].refused
    ]


@pytest.mark.parametrize(("family", "name"), _others())
def test_frames_of_every_family_equal_the_dense_reference(family, name):
    """Whatever a picture is to a model: tiles, a sample's tiles in one tensor, tokens that nobody can place."""
    batch, model = tiny.inputs(family, images=(3, 2), text=(4, 7), alike=True), tiny.build(family)
    with pruned(model, name) as handle, handle.clips([3, 1, 1]):
        run, report = oracle.run(model, batch, **oracle.GREEDY), handle.report
    (clip,), (one, other) = report.images
    assert clip[0] == 3 * one[0] == 3 * other[0] and clip[1] < clip[0]
    error = relative_errors(family, batch, run, report)
    assert error.max() < TOLERANCE, [f"{e:.1e}" for e in error.tolist()]


def test_methods_that_look_at_frames_choose_as_without_a_word():
    model, batch = tiny.build("llava"), frames_of("llava")
    with pruned(model, "fopru_rank") as handle:
        plain = oracle.run(model, batch, max_new_tokens=3)
        with handle.clips([4, 3]):
            said = oracle.run(model, batch, max_new_tokens=3)
    assert torch.equal(plain.logits, said.logits)


def test_methods_that_compare_frames_choose_otherwise_once_told():
    model, batch = tiny.build("llava"), frames_of("llava", images=(4,), text=(4,))
    kept = []
    for frames in (None, [4], 4, 2):
        with pruned(model, "vidcom2") as handle:
            if frames is None:
                oracle.run(model, batch, max_new_tokens=1)
            else:
                with handle.clips(frames):
                    oracle.run(model, batch, max_new_tokens=1)
        kept.append(handle.report.layers[0].kept)
    assert torch.equal(kept[1], kept[2]) and not torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[3])


def test_what_was_said_ends_with_its_block_and_belongs_to_its_thread():
    model, batch = tiny.build("llava"), frames_of("llava", images=(4,), text=(4,))
    with pruned(model, "evs") as handle:
        with handle.clips(4), handle.clips([2, 2]):
            oracle.run(model, batch, max_new_tokens=1)
            assert len(handle.report.images[0]) == 2
        oracle.run(model, batch, max_new_tokens=1)
        assert len(handle.report.images[0]) == 4


def test_every_place_of_a_tiled_picture_is_compared_with_itself():
    """LLaVA-NeXT: the overview with the overview, each crop with the same crop, newline tokens stay."""
    model = tiny.build("llava_next")
    batch = tiny.inputs("llava_next", images=(1,), text=(5,))
    ids = batch["input_ids"][0]
    at = (ids == tiny.IMAGE).nonzero().flatten()
    twice = torch.cat([ids[: at[-1] + 1], ids[at[0] :]])[None]
    batch = {
        "input_ids": twice,
        "attention_mask": torch.ones_like(twice),
        "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1, 1),
        "image_sizes": batch["image_sizes"].repeat(2, 1),
    }
    batch["pixel_values"][1, 0, :, :4] += 1.0  # a stripe of the overview changes, nothing of the crops
    with foveate.prune(model, "evs", keep=0.6, record=True) as handle, handle.clips(2):
        run = oracle.run(model, batch, **oracle.GREEDY)
    (tokens,) = handle.report.image_tokens[0]
    kept = handle.report.layers[0].kept[0, 0, tokens.positions]
    first = [tile for tile in tokens.tiles if tile.frame == 0]
    assert all(kept[tile.index].all() for tile in first)
    hides = hidden(handle.report, twice.shape[1])
    assert oracle.errors(tiny.build("llava_next", "eager"), batch, run, hides).max() < TOLERANCE


# Frames that come as videos of their own ---------------------------------------------------------------------


def two_films(family: str, rows: int = 1) -> dict:
    """Prompts with two films of one kind behind each other, of which no input says where the second begins."""
    batch = tiny.videos(family, videos=(1,) * rows, text=(5,) * rows, images=(1,) * rows)
    names = {"pixel_values_videos": 3 if family == "minicpmv4_6" else 0}
    names |= {name: 0 for name in ("video_grid_thw", "target_sizes_videos") if name in batch}
    film = torch.tensor(tiny.found[family].film(0)).expand(rows, -1)
    ids = torch.cat([film, batch["input_ids"]], 1)
    changed = {name: torch.cat([batch[name], batch[name] + 0], along) for name, along in names.items()}
    return batch | changed | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", ["kimi_k25", "minicpmv4_6"])
@pytest.mark.parametrize("name", ["evs", "fopru_rank", "fastv"])
def test_frames_of_a_sample_are_a_clip_unless_the_user_says_which_are(family, name):
    model, batch = tiny.build(family), two_films(family)
    frames, image = tiny.found[family].clip(0), tiny.found[family].features(0)
    told = {None: [2 * sum(frames), image], len(frames): [sum(frames)] * 2 + [image]}
    for word, tokens in told.items():
        with pruned(model, name) as handle:
            if word is None:
                run = oracle.run(model, batch, **oracle.GREEDY)
            else:
                with handle.clips(word):  # of the films; the picture needs no word
                    run = oracle.run(model, batch, **oracle.GREEDY)
        assert [count for count, _ in handle.report.images[0]] == tokens
        assert relative_errors(family, batch, run, handle.report).max() < TOLERANCE


@pytest.mark.parametrize("family", ["kimi_k25", "minicpmv4_6"])
def test_without_a_film_the_word_is_of_pictures(family):
    model, batch = tiny.build(family), tiny.inputs(family, images=(2,), alike=True)
    with pruned(model, "vidcom2") as handle, handle.clips(2):
        oracle.run(model, batch, max_new_tokens=1)
    assert len(handle.report.images[0]) == 1
    film = tiny.videos(family)
    frames = len(tiny.found[family].clip(0))
    with (
        pruned(model, "vidcom2") as handle,
        handle.clips([frames + 1]),
        pytest.raises(foveate.UnsupportedError, match=f"{frames} pictures came"),
    ):
        oracle.run(model, film, max_new_tokens=1)


# What cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [0, [2, 0], True, [1.5], -1, ["2"]])
def test_a_clip_without_frames_is_no_clip(frames):
    with (
        pruned(tiny.build("llava"), "evs") as handle,
        pytest.raises(ValueError, match="a clip has at least 1 frame"),
        handle.clips(frames),
    ):
        pass


@pytest.mark.parametrize("frames", [[2, 1], 3, [8]])
def test_frames_that_do_not_come_are_missed(frames):
    model, batch = tiny.build("llava"), frames_of("llava", images=(4,), text=(4,))
    with (
        pruned(model, "evs") as handle,
        handle.clips(frames),
        pytest.raises(foveate.UnsupportedError, match="4 pictures came"),
    ):
        oracle.run(model, batch, max_new_tokens=1)


def test_a_clip_that_two_samples_share_is_none():
    model, batch = tiny.build("llava"), frames_of("llava", images=(2, 2))
    with (
        pruned(model, "evs") as handle,
        handle.clips([3, 1]),
        pytest.raises(foveate.UnsupportedError, match="one sample do not match"),
    ):
        oracle.run(model, batch, max_new_tokens=1)


def test_frames_of_different_shapes_cannot_be_compared():
    model, batch = tiny.build("llava_next"), tiny.inputs("llava_next", images=(2,), text=(4,))
    with (
        pruned(model, "evs") as handle,
        handle.clips(2),
        pytest.raises(foveate.UnsupportedError, match=r"differ in shape|frames"),
    ):
        oracle.run(model, batch, max_new_tokens=1)


@core
def test_a_video_without_frames_says_so(family):
    model, batch = tiny.build(family), tiny.videos(family)
    empty = batch | {"video_grid_thw": torch.tensor([[0, 8, 12]]), "pixel_values_videos": torch.zeros(0, 96)}
    with pruned(model, "evs"), pytest.raises(ValueError, match="a clip without frames"):
        model.model.get_video_features(empty["pixel_values_videos"], empty["video_grid_thw"])


@pytest.mark.parametrize("name", ["fopru_rank", "fastv", "plphp"])
def test_videos_that_a_family_does_not_lay_out_are_refused(name, monkeypatch):
    monkeypatch.setattr(type(foveate.get_family("qwen2_5_vl")), "video_token_id", lambda self, config: None)
    model, batch = tiny.build("qwen2_5_vl"), tiny.videos("qwen2_5_vl")
    assert oracle.run(model, batch, max_new_tokens=2).logits.isfinite().all()
    with pruned(model, name), pytest.raises(foveate.UnsupportedError, match=r"frames of their videos.*pruned\.clips"):
        model.generate(**batch, max_new_tokens=2)
