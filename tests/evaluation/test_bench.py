"""`foveate bench`: complete rows, an ideal with the right lengths, and no gain where nothing was freed."""

import csv
import json
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText, DynamicCache
from typer.main import get_command
from typer.testing import CliRunner

import foveate
from foveate.asking.mistake import Mistake
from foveate.commands.app import app
from foveate.engine.cache import PrunedLayer
from foveate.evaluation import geometries, timing
from foveate.evaluation.ideal import Plan, ideal
from foveate.evaluation.speed import Bench, _compare
from foveate.evaluation.synthetic import synthetic
from foveate.methods.base import CacheMethod

FAST = ["--geometry", "tiny", "--device", "cpu", "--dtype", "float32", "--new-tokens", "3", "--repeat", "2"]


def run(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)])


def bench(attn="sdpa", batch=1, padded=False):
    config = geometries.get_config("tiny")
    model = geometries.build(config, device="cpu", dtype="float32", attn=attn)
    return Bench(model, synthetic(config, batch, padded=padded), new_tokens=3, repeat=2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of a small run, and what it printed."""
    out = tmp_path_factory.mktemp("bench") / "out"
    result = run(*FAST, "--methods", "fopru,fastv,plphp", "--keep", "9,1.0", "--batch", "1,2", "--out", out)
    assert result.exit_code == 0, result.output
    return out, result


def rows_of(folder):
    return json.loads((folder / "rows.json").read_text())


# -- rows ---------------------------------------------------------------------------------------------------------


def test_rows_are_complete(measured):
    out, result = measured
    rows = rows_of(out)
    cases = {(row["method"], row["keep"], row["batch"]) for row in rows}
    assert cases == {(m, k, b) for m in ("fopru", "fastv", "plphp") for k in (9, 1.0) for b in (1, 2)}
    for row in rows:
        for prefix in ("", "untouched_", "ideal_"):
            spent = {name: row[f"{prefix}{name}_ms"] for name in ("ttft", "vision", "prefill", "decode")}
            assert all(math.isfinite(value) and value > 0 for value in spent.values()), (row, spent)
            assert row[f"{prefix}ttft_q1_ms"] <= row[f"{prefix}ttft_ms"] <= row[f"{prefix}ttft_q3_ms"]
            assert row[f"{prefix}tokens_per_s"] > 0 and row[f"{prefix}peak_bytes"] is None  # the CPU does not say
        for name in ("untouched_selection_ms", "ideal_selection_ms"):
            assert row[name] == 0
        assert (row["selection_ms"] > 0) == (row["keep"] != 1.0)
        assert row["prompt_tokens"] == 64 + 36 and row["image_tokens"] == 36
    with (out / "rows.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == [row["method"] for row in rows]
    about = json.loads((out / "run.json").read_text())
    assert about["finished"] and about["settings"]["threads"] == torch.get_num_threads()
    assert about["settings"]["seed"] == 0
    assert {path.name for path in out.glob("*.png")} == {
        f"{n}-batch-{b}.png" for n in ("ttft", "decode") for b in (1, 2)
    }
    assert "fopru" in result.stdout and "gain %" in result.stdout


def test_kept_tokens_and_bytes_are_those_of_the_shapes(measured):
    for row in rows_of(measured[0]):
        kept = {9: 9, 1.0: 36}[row["keep"]]
        entry = row["batch"] * 2 * 2 * 16 * 4  # KV heads, keys and values, head size, float32
        assert row["untouched_kv_bytes"] == 4 * 100 * entry
        if row["method"] != "plphp":
            assert row["kept_tokens"] == kept
            full = {"fopru": 0, "fastv": 2}[row["method"]]  # layers in front of the drop
            assert row["kv_bytes"] == (full * 100 + (4 - full) * (64 + kept)) * entry
            assert row["token_layers"] == (full + (4 - full) * kept / 36) / 4
        else:
            assert row["token_layers"] == 1
        assert row["ideal_kv_bytes"] == row["kv_bytes"]
        assert row["kv_share"] == row["kv_bytes"] / row["untouched_kv_bytes"]
        if row["keep"] == 1.0 or row["method"] == "plphp":
            assert row["ttft_gain_share"] is None  # nothing to gain before the first token


def test_resumes_and_takes_further_methods(measured):
    out, _ = measured
    before = rows_of(out)
    again = run(*FAST, "--methods", "plphp,random", "--keep", "9", "--batch", "2", "--out", out)
    assert again.exit_code == 0, again.output
    after = rows_of(out)
    assert after[: len(before)] == before
    assert [(row["method"], row["keep"], row["batch"]) for row in after[len(before) :]] == [("random", 9, 2)]
    assert f"{len(before)} rows kept, measured on " in again.stderr and "; 1 measured now" in again.stderr
    files = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    idle = run(*FAST, "--methods", "plphp,random", "--keep", "9", "--batch", "2", "--out", out)
    assert idle.exit_code == 0 and f"nothing new in {out}" in idle.stderr
    assert f"{len(after)} rows kept, measured on " in idle.stderr and "; 0 measured now" in idle.stderr
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == files
    other = run(*FAST, "--methods", "random", "--keep", "0.5", "--batch", "2", "--padded", "--out", out)
    assert other.exit_code == 2 and "padded" in other.stderr and "--out" in other.stderr


def test_an_interrupt_leaves_finished_rows(tmp_path, monkeypatch):
    measure = Bench.measure

    def stop(self, methods, *args):
        if methods[0].name == "plphp":
            raise KeyboardInterrupt
        return measure(self, methods, *args)

    monkeypatch.setattr(Bench, "measure", stop)
    args = (*FAST, "--methods", "fopru,plphp", "--out", tmp_path / "out")
    first = run(*args)
    assert first.exit_code == 130 and "1 finished rows" in first.stderr
    assert [row["method"] for row in rows_of(tmp_path / "out")] == ["fopru"]
    monkeypatch.undo()
    assert run(*args).exit_code == 0
    assert [row["method"] for row in rows_of(tmp_path / "out")] == ["fopru", "plphp"]


def test_without_out_the_same_command_goes_on_after_a_failure_and_after_ctrl_c_while_plots_are_drawn(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    args = (*FAST, "--methods", "fopru")

    def fail(self, *args):
        raise ValueError("no memory")

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "measure", fail)
        assert run(*args).exit_code == 1
    with monkeypatch.context() as patch:
        patch.setattr("foveate.evaluation.bench._draw", stop)
        assert run(*args).exit_code == 130
    assert run(*args).exit_code == 0
    (folder,) = (tmp_path / "results").iterdir()
    about = json.loads((folder / "run.json").read_text())
    assert about["finished"] and [each["rows"] for each in about["runs"]] == [0, 1]


def test_a_method_that_nobody_trained_for_random_weights_is_timed_without(tmp_path):
    """The model was not trained either."""
    result = run(*FAST, "--methods", "vistog", "--keep", "9", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (row,) = rows_of(tmp_path / "out")
    assert row["kept_tokens"] == 9 and 0 < row["kv_share"] < 1
    result = run("--model", "glimpse", "--methods", "vistog", "--keep", "7", "--out", tmp_path / "other")
    assert result.exit_code != 0 and "vistog" in result.stderr and "train" in result.stderr


@pytest.mark.slow
def test_every_method_that_fits_is_measured(tmp_path):
    result = run(*FAST, "--methods", "all", "--repeat", "1", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    measured = {row["method"].partition(":")[0] for row in rows_of(tmp_path / "out")}
    left_out = {name for name in foveate.methods() if re.search(rf"left out: {name}\b", result.stderr)}
    assert measured | left_out == set(foveate.methods()) and "fopru" in measured
    assert not measured & left_out


# -- the ideal ----------------------------------------------------------------------------------------------------


def watch_lengths(bench, run):
    """Tokens that each decoder layer computes in the prefill, and what its cache holds then."""
    computed, held, handles = [], [], []
    for layer in bench.family.decoder(bench.base).layers:
        handles.append(layer.register_forward_pre_hook(lambda module, args: computed.append(args[0].shape[1])))

    def hold(module, args, output):
        held.append([layer.keys.shape[2] for layer in getattr(output, tiny.CACHE).layers])

    # The hooks of the ideal, installed first, have shortened by then.
    handles.append(bench.model.register_forward_hook(hold))
    try:
        out = run()
    finally:
        for handle in handles:
            handle.remove()
    return computed[:4], held[0], out


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("method", "computed", "held"),
    [
        (foveate.FoPru(keep=9), [73, 73, 73, 73], [73, 73, 73, 73]),
        (foveate.FastV(keep=9, layer=2), [100, 100, 73, 73], [100, 100, 73, 73]),
        (foveate.VideoLLMMoD(keep=9, router="uniform"), [100, 73, 100, 73], [100, 73, 100, 73]),
        (foveate.VideoLLMMoD(keep=9, router="uniform", layers=(0, 2)), [73, 100, 73, 100], [73, 100, 73, 100]),
        (foveate.get_method("visual_snapkv", keep=9), [100, 100, 100, 100], [73, 73, 73, 73]),
    ],
)
@pytest.mark.sampled(5)
def test_the_ideal_has_as_many_tokens_in_every_layer_as_the_method(method, computed, held, padded, attn):
    it = bench(attn, batch=2, padded=padded)

    def generate():
        with torch.inference_mode():
            return it.model.generate(**it.inputs, do_sample=False, max_new_tokens=4)

    with foveate.prune(it.model, method, record=True) as pruned:
        _, held_by_method, _ = watch_lengths(it, generate)
    plan = Plan.of(pruned.report, [method.place], it.start)
    assert held_by_method == held == list(plan.held)
    with ideal(it.family, it.base, plan):
        # Fewer hooks run in front of ours than behind: each sees what the layer itself sees.
        seen, cached, out = watch_lengths(it, generate)
    assert (seen, cached) == (computed, held)
    assert out.shape == (2, 104)
    plain = generate()
    with ideal(it.family, it.base, plan):
        pass
    assert torch.equal(generate(), plain) and not it.base.language_model._forward_pre_hooks


def test_image_tokens_pass_through_a_share_of_the_layers():
    """With a fifth of them in every second layer, through six tenths."""
    config = geometries.get_config("tiny", 25)
    config.text_config.num_hidden_layers = 6
    model = geometries.build(config, device="cpu", dtype="float32", attn="sdpa")
    it = Bench(model, synthetic(config, 1, tokens=25), new_tokens=2, repeat=1)
    for router in ("learned", "uniform"):
        row = it.measure(foveate.VideoLLMMoD(router=router).untrained())
        assert row["token_layers"] == 0.6 and row["kept_tokens"] == 5 and row["image_tokens"] == 25
        assert row["kv_bytes"] == row["ideal_kv_bytes"] == (3 * 89 + 3 * 69) * 2 * 2 * 16 * 4


def test_budgets_of_their_own_in_each_layer_reach_the_ideal():
    it = bench(batch=2, padded=True)
    with foveate.prune(it.model, "plphp", keep=0.4, start_layer=1, record=True) as pruned, torch.inference_mode():
        it.model.generate(**it.inputs, max_new_tokens=2)
    plan = Plan.of(pruned.report, ["cache"], it.start)
    assert plan.held[0] == 100 and len(set(plan.held)) > 1 and not plan.shortens_prefill
    with ideal(it.family, it.base, plan), torch.inference_mode():
        out = it.model.generate(**it.inputs, max_new_tokens=4, return_dict_in_generate=True)
        cache = getattr(out, tiny.CACHE)
    assert [layer.keys.shape[2] - 3 for layer in cache.layers] == list(plan.held)


def test_the_ideal_of_fewer_image_tokens_is_the_untouched_model_on_fewer_embeddings():
    it = bench()
    plan = Plan(("self",) * 4, 100, it.start, 0, (73,) * 4, (73,) * 4)
    with torch.inference_mode():
        with ideal(it.family, it.base, plan):
            ours = it.model(**it.inputs, **{tiny.CACHE: DynamicCache()}).logits
        features = torch.cat(it.base.get_image_features(it.inputs["pixel_values"]).pooler_output)
        ids = it.inputs["input_ids"]
        embeds = it.model.get_input_embeddings()(ids)
        embeds[ids == it.model.config.image_token_id] = features
        short = torch.cat([embeds[:, : it.start], embeds[:, it.start + 27 :]], 1)
        theirs = it.model(inputs_embeds=short).logits
    assert torch.equal(ours, theirs)


# Beside the core those whose language model is handed more than embeddings and a mask of padding.
HANDED = [name for name, each in tiny.found.items() if each.both_ways or foveate.get_family(each.config()).deepstack]


# And those some of whose layers carry a state.
STATES = [
    name
    for name in tiny.FAMILIES
    if {"linear_attention", "conv"} & set(getattr(tiny.config(name).get_text_config(), "layer_types", None) or ())
]


@pytest.mark.parametrize("family", [*tiny.CORE, *HANDED, *STATES])
def test_every_family_is_measured(family):
    model = tiny.build(family, attn=tiny.found[family].backends[0])
    try:
        inputs = small(model.config, 2, padded=True)
    except Mistake as mistake:
        pytest.skip(str(mistake))
    method = foveate.TrimmedLlama(keep=0.1) if family == "mllama" else foveate.FastV(keep=0.5, layer=2)
    row = Bench(model, inputs, new_tokens=2, repeat=1).measure(method)
    assert row["kept_tokens"] < row["image_tokens"]
    assert row["ideal_kv_bytes"] == row["kv_bytes"] < row["untouched_kv_bytes"]
    assert row["selection_ms"] > 0 and row["vision_ms"] > 0


# -- planted: what saves nothing must not look as if it did ----------------------------------------------------------


@dataclass
class Hides(CacheMethod):
    """Makes image tokens invisible by overwriting their keys, and keeps all of them."""

    name = "hides"
    summary = source = "planted"
    keep: float | int = 0.25

    def score(self, tokens):
        hidden = tokens.image_mask()[:, None, :, None]
        tokens.key.masked_fill_(hidden, -1e4)
        return super().score(tokens)

    def select(self, scores, budget):
        return scores > -math.inf


def test_masking_instead_of_freeing_shows_no_gain():
    row = bench().measure(Hides())
    assert row["kv_bytes"] == row["untouched_kv_bytes"] and row["kv_share"] == 1
    assert row["ttft_gain_share"] is row["decode_gain_share"] is None


def test_views_of_a_cache_that_is_still_held_show_no_gain(monkeypatch):
    evict = PrunedLayer.keep

    def view(self, *args):
        keys, values = self.keys, self.values
        choice = evict(self, *args)
        for name, full in (("keys", keys), ("values", values)):
            kept = getattr(self, name)
            full[:, :, : kept.shape[2]] = kept
            setattr(self, name, full[:, :, : kept.shape[2]])
        return choice

    monkeypatch.setattr(PrunedLayer, "keep", view)
    row = bench().measure(foveate.PLPHP(keep=0.25))
    assert row["kept_tokens"] < 36  # what the report says
    assert row["kv_bytes"] == row["untouched_kv_bytes"]


# -- the clock ----------------------------------------------------------------------------------------------------


def test_spans_inside_others_count_once(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    watch = timing.Stopwatch(torch.device("cpu"))
    select = watch.wrap("selection", lambda: None)  # 1 tick

    def score():
        return select()  # 3 ticks, one of them in select

    def encode(pixels):
        watch.wrap("selection", score)()  # 5 ticks, three of them in score

    encode = watch.wrap("vision", encode)
    encode(None)
    assert watch.read() == {"vision": 2, "selection": 3}
    assert watch.read() == {}


def test_a_watched_model_and_method_are_as_before():
    it, method = bench(), foveate.FoPru(keep=0.25)
    with timing.watched(it.watch, it.family, it.base, [method]):
        assert "select" in vars(method) and "get_image_features" in vars(it.base)
    assert "select" not in vars(method) and "get_image_features" not in vars(it.base)
    assert method == foveate.FoPru(keep=0.25)


def test_quartiles():
    assert timing.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


# -- geometries ---------------------------------------------------------------------------------------------------

PARAMETERS = {  # in billions, of the published weights
    "llava-1.5-7b": 7.06,
    "llava-next-7b": 7.06,
    "llava-next-mistral-7b": 7.57,
    "qwen2.5-vl-7b": 8.29,
    "llava-onevision-7b": 8.03,
    "qwen2.5-vl-3b": 3.75,
    "qwen3-vl-8b": 8.77,
    "qwen3-vl-2b": 2.13,
    "qwen3-vl-1b": 0.60 + 0.39,  # made up: Qwen3-0.6B, and the encoder of the 2B model in front of fewer columns
    "internvl3.5-8b": 8.53,
    "gemma3-12b": 12.19,
    "gemma3-1b": 1.00 + 0.09,  # made up: Gemma 3 1B and SigLIP-B
    "smolvlm2-2.2b": 2.25,
    "llama-3.2-11b-vision": 10.67,
    "1b": 1.24 + 0.30,  # Llama-3.2-1B and CLIP-L
}
TOKENS = {
    "llava-1.5-7b": 576,
    "llava-next-7b": 2880 + 48,
    "llava-next-mistral-7b": 2880 + 48,
    "qwen2.5-vl-7b": 1296,
    "llava-onevision-7b": 3645 + 54,
    "qwen2.5-vl-3b": 1296,
    "qwen3-vl-8b": 1296,
    "qwen3-vl-2b": 1296,
    "qwen3-vl-1b": 1296,
    "internvl3.5-8b": 1280,
    "gemma3-12b": 256,
    "gemma3-1b": 576,
    "smolvlm2-2.2b": 1377,
    "llama-3.2-11b-vision": 1,
    "1b": 576,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_geometries_have_the_size_of_the_published_models(name):
    config = geometries.get_config(name)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(PARAMETERS[name], abs=0.01)
    ids = synthetic(config, 1)["input_ids"]
    assert (ids == config.image_token_id).sum() == TOKENS[name]
    assert foveate.get_family(config) is not None


def test_every_geometry_is_named_and_measured():
    """In the help, which imports nothing heavy, and on the page; and of each the size is known."""
    (option,) = (option for option in get_command(app).commands["bench"].params if option.name == "geometry")
    page = Path("docs/measuring.md").read_text("utf-8")
    names = set(geometries.GEOMETRIES) - {"tiny"}
    assert names == set(PARAMETERS) == set(TOKENS)
    assert all(f" {name}" in option.help and f"`{name}`" in page for name in names)


def test_random_weights_give_finite_logits_and_listen_to_the_seed():
    config = geometries.get_config("tiny")
    one, same, other = (geometries.build(config, device="cpu", dtype="float32", attn=None, seed=s) for s in (0, 0, 1))
    inputs = synthetic(config, 1)
    with torch.inference_mode():
        logits = [model(**inputs).logits for model in (one, same, other)]
    assert logits[0].isfinite().all() and 0.1 < logits[0].std() < 10
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2])


@pytest.mark.parametrize(("name", "tokens", "given"), [("1b", 2500, 2500), ("qwen2.5-vl-7b", 600, 600)])
def test_image_tokens_can_be_chosen(name, tokens, given):
    config = geometries.get_config(name, tokens)
    ids = synthetic(config, 1, tokens=tokens)["input_ids"]
    assert (ids == config.image_token_id).sum() == given


def test_padded_batches_are_padded_on_the_left():
    inputs = synthetic(geometries.get_config("tiny"), 3, padded=True)
    assert inputs["attention_mask"].sum(1).tolist() == [100, 84, 100]
    assert inputs["attention_mask"][1, 0] == 0 and inputs["attention_mask"][1, -1] == 1


def test_a_share_of_the_gain_needs_runs_that_show_the_noise():
    shares = [
        _compare("ttft", [6.0] * runs, [10.0] * runs, [5.0] * runs, True)["ttft_gain_share"] for runs in (1, 2, 3, 4)
    ]
    assert shares == [None, None, 0.8, 0.8]


# -- synthetic inputs ----------------------------------------------------------------------------------------------


def small(config, batch, **options):
    """Inputs with few tokens, where that can be asked for."""
    try:
        return synthetic(config, batch, tokens=16, **options)
    except Mistake:
        return synthetic(config, batch, **options)


def test_every_family_finds_its_images_and_clips_in_synthetic_inputs():
    """By what it says of the model's inputs, without a model."""
    without = []
    for name, each in tiny.found.items():
        config = each.config()
        family = foveate.get_family(config)
        if not each.in_prompt:
            continue
        for frames in (None, 3):
            try:
                inputs = small(config, 2, padded=True, frames=frames)
            except Mistake as mistake:
                assert f"no synthetic inputs for {config.model_type} models" in str(mistake)
                without.append(name)
                continue
            video = "pixel_values_videos" in inputs
            assert not video or frames
            layouts = (family.video_layouts if video else family.layouts)(config, inputs)
            placeholder = family.video_token_id(config) if video else family.image_token_id(config)
            assert (inputs["input_ids"] == placeholder).sum() == sum(layout.tokens for layout in layouts), name
            assert sum(layout.frames for layout in layouts) == 2 * (frames or 1), name
            kinds = [kinds for key, kinds in inputs.items() if key.endswith("mm_token_type_ids")]
            assert all(((kinds > 0) == (inputs["input_ids"] == placeholder)).all() for kinds in kinds), name
    assert set(without) == {"gemma3n"}


@pytest.mark.parametrize("family", tiny.sampled(name for name in tiny.found if tiny.found[name].in_prompt))
@pytest.mark.parametrize("frames", [None, 2])
def test_synthetic_inputs_run(family, frames):
    model = tiny.build(family, attn=tiny.found[family].backends[0])
    try:
        inputs = small(model.config, 2, padded=True, frames=frames)
    except Mistake as mistake:
        pytest.skip(str(mistake))
    pruned = foveate.prune(model, "random", keep=0.5)
    frames_are_pictures = frames and "pixel_values" in inputs
    with pruned, pruned.clips(frames) if frames_are_pictures else nullcontext(), torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=2)
    assert out.shape == (2, inputs["input_ids"].shape[1] + 2)
    assert [len(images) for images in pruned.report.images] == [1, 1]
    assert all(0 < kept < tokens for images in pruned.report.images for tokens, kept in images)


def test_a_family_of_a_known_kind_needs_no_entry(monkeypatch):
    """What a package of somebody else brings is benched as its base is."""

    class Mine(type(foveate.get_family("llava"))):
        model_type = "mine"

    monkeypatch.setattr("foveate.evaluation.synthetic.get_family", lambda config: Mine())
    assert (synthetic(geometries.get_config("tiny"), 1)["input_ids"] == 95).sum() == 36


# -- mistakes -----------------------------------------------------------------------------------------------------

MISTAKES = {
    "neither": ([], "--geometry"),
    "both": (["--geometry", "tiny", "--model", "glimpse"], "either"),
    "geometry": (["--geometry", "70b"], "llava-1.5-7b"),
    "method": ([*FAST, "--methods", "nonsense"], "nonsense"),
    "place": ([*FAST, "--methods", "trimmed_llama"], "cross-attention"),
    "option": ([*FAST, "--methods", "fopru:strategy=column"], "strategy"),
    "layer": ([*FAST, "--methods", "fastv:layer=9"], "layer"),
    "keep": ([*FAST, "--keep", "1.5"], "keep"),
    "batch": ([*FAST, "--batch", "0"], "--batch 0"),
    "one that is padded": ([*FAST, "--padded"], "--batch 2"),
    "seed": ([*FAST, "--seed", str(2**63)], "--seed"),
    "words for a batch": ([*FAST, "--batch", "many"], "--batch many"),
    "device": (["--geometry", "tiny", "--device", "tpu9"], "tpu9"),
    "dtype": (["--geometry", "tiny", "--dtype", "int3"], "int3"),
    "attention": ([*FAST, "--attn", "nonsense"], "--attn nonsense"),
    "one token": (["--geometry", "tiny", "--new-tokens", "1"], "--new-tokens"),
    "no square": (["--geometry", "1b", "--image-tokens", "500"], "484 or 529"),
    "no tiling": (["--geometry", "llava-next-7b", "--image-tokens", "2880"], "2928"),
    "no shape": (["--geometry", "qwen2.5-vl-7b", "--image-tokens", "601"], "576 or 580"),
    "features": (["--geometry", "llama-3.2-11b-vision", "--image-tokens", "100"], "6404"),
    "fixed size": (["--model", "glimpse", "--image-tokens", "100"], "144"),
    "a folder that is none": (["--model", "./nowhere"], "nowhere"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setattr(geometries, "build", lambda *args, **kwargs: pytest.fail("built before it was checked"))
    args, said = MISTAKES[name]
    result = run(*args, "--out", tmp_path / "out")
    assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_weights_larger_than_the_machine_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}[name])
    result = run(*FAST, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "GB" in result.stderr and "--geometry 1b" in result.stderr
