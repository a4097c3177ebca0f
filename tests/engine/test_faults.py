"""Situations from public bug reports on pruning, caching and serving: right, or refused with a reason."""

from __future__ import annotations

import gc
import types
import weakref

import oracle
import pytest
import tiny
import torch
from cases import BEFORE_LLM, FITS, IN_CROSS_ATTENTION, PLACES, TOLERANCE, image_tokens, prune, pruned_run
from oracle import hidden
from test_guided import guide_of
from traces import changes, snapshot
from transformers import (
    DeepseekV3Config,
    Dinov2Config,
    GPTNeoXConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PersimmonConfig,
    PhiConfig,
)

import foveate
from foveate.engine import routes
from foveate.methods.baselines import drawn, seeded
from foveate.testing.tiny.building import randomize

places = pytest.mark.parametrize(("family", "name"), PLACES)
decoder_places = pytest.mark.parametrize(("family", "name"), [p for p in PLACES if p[0] != "mllama"])
in_decoder = [(family, name) for family, name in FITS if name not in IN_CROSS_ATTENTION]


# -- features of another block ------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["fopru_rank", "fastv", "plphp"])
@pytest.mark.parametrize("first", ["fopru_rank", "fastv", "plphp"])
@torch.no_grad()
def test_features_carry_no_choice_into_another_block(first, second):
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    rest = {name: value for name, value in batch.items() if name != "pixel_values"}
    with prune(model, first):
        features = model.model.get_image_features(batch["pixel_values"], return_dict=True)
        own = model(**rest, mm_encoder_outputs={"image": features}).logits
        assert torch.equal(own, model(**batch).logits), "in its own block they are as good as pixels"
    with prune(model, second), pytest.raises(foveate.UnsupportedError, match="another pruning"):
        model(**rest, mm_encoder_outputs={"image": features})


# -- attention that nobody routed ---------------------------------------------------------------------------------


def patched(model, index):
    """One layer with an attention of its own, which asks transformers for nothing."""
    attention = model.model.language_model.layers[index].self_attn

    def own(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states), None

    attention.forward = types.MethodType(own, attention)
    return model


@pytest.mark.parametrize("name", ["fopru_rank", "fastv", "plphp", "plphp_fixed", "random_cache"])
@pytest.mark.parametrize("index", [0, 2, 3])
@torch.no_grad()
def test_a_layer_that_does_not_ask_for_its_kernel_is_refused(name, index):
    batch, model = tiny.inputs("llava"), patched(tiny.build("llava"), index)
    model(**batch)
    with prune(model, name), pytest.raises(foveate.UnsupportedError, match=f"decoder layer {index} does not ask"):
        model(**batch)


@pytest.mark.parametrize("name", BEFORE_LLM)
@torch.no_grad()
def test_a_padded_batch_does_not_end_in_such_a_layer(name):
    """Its mask is of the whole prompt, and the rows are fewer."""
    batch, model = tiny.inputs("llava", **tiny.BATCHES["ragged"]), tiny.build("llava")
    attention = model.model.language_model.layers[0].self_attn

    def own(self, hidden_states, *args, attention_mask=None, **kwargs):
        if attention_mask is not None:
            hidden_states = hidden_states + attention_mask.float().mean(1)[..., :1]
        return hidden_states, None

    attention.forward = types.MethodType(own, attention)
    model(**batch)
    with prune(model, name), pytest.raises(foveate.UnsupportedError, match="decoder layer 0 does not ask"):
        model(**batch)


@decoder_places
@torch.no_grad()
def test_replicas_of_a_pruned_model_are_pruned(family, name):
    """As nn.DataParallel makes them."""
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    with prune(model, name) as pruned:
        expected, report = model(**batch).logits, pruned.report
        modules = list(model.modules())
        copies = {module: module._replicate_for_data_parallel() for module in modules}
        for module, copied in copies.items():
            copied._parameters.update(module._parameters)
            copied._buffers.update(module._buffers)
            inside = {key: None if child is None else copies[child] for key, child in module._modules.items()}
            copied._modules.update(inside)
        assert torch.equal(copies[model](**batch).logits, expected)
        assert pruned.report is not report and pruned.report.to_dict() == report.to_dict()


# -- models that are switched, packed ----------------------------------------------------------------------------


@places
def test_attention_switched_inside_the_block_is_checked_again(family, name):
    batch, model = tiny.inputs(family), tiny.build(family)
    eager, _ = pruned_run(tiny.build(family, "eager"), name, batch, max_new_tokens=4)
    with prune(model, name):
        model.set_attn_implementation("eager")
        assert torch.equal(oracle.run(model, batch, max_new_tokens=4).logits, eager.logits)
        model.model.language_model.config._attn_implementation = "flex_attention"
        with pytest.raises(foveate.UnsupportedError, match="flex_attention"):
            model(**batch)


@pytest.mark.parametrize("name", ["fopru_rank", "uniform", "divprune", "fastv"])
@torch.no_grad()
def test_samples_packed_into_one_row_are_refused(name):
    one, two = tiny.inputs("llava", seed=1), tiny.inputs("llava", text=(9,), seed=2)
    packed = {
        "input_ids": torch.cat([one["input_ids"], two["input_ids"]], 1),
        "position_ids": torch.cat([torch.arange(part["input_ids"].shape[1]) for part in (one, two)])[None],
        "pixel_values": torch.cat([one["pixel_values"], two["pixel_values"]]),
    }
    model = tiny.build("llava")
    with prune(model, name):
        with pytest.raises(foveate.UnsupportedError, match="start again inside a row"):
            model(**packed, use_cache=False)
        model(**{**packed, "position_ids": torch.arange(packed["input_ids"].shape[1])[None]})


@pytest.mark.parametrize("name", ["uniform", "divprune", "fastv"])
@torch.no_grad()
def test_packed_samples_are_told_by_the_axis_of_time(name):
    """Those of height and width start again in every picture."""
    one, two = tiny.inputs("qwen2_5_vl", seed=1), tiny.inputs("qwen2_5_vl", text=(9,), seed=2)
    model = tiny.build("qwen2_5_vl")
    known = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    parts = [model.model.get_rope_index(**{name: part[name] for name in known})[0] for part in (one, two)]
    packed = {name: torch.cat([one[name], two[name]], 1) for name in ("input_ids", "mm_token_type_ids")}
    packed |= {name: torch.cat([one[name], two[name]]) for name in ("pixel_values", "image_grid_thw")}
    later = torch.cat([parts[0], parts[1] + parts[0].max() + 1], -1)
    with prune(model, name):
        with pytest.raises(foveate.UnsupportedError, match="start again inside a row"):
            model(**packed, position_ids=torch.cat(parts, -1))
        model(**packed, position_ids=later)


# -- what is left behind ------------------------------------------------------------------------------------------


@places
def test_a_model_that_nobody_holds_is_freed(family, name):
    """Also one that was never removed, as a notebook leaves it."""
    gc.collect()
    before, model = len(routes._routed), tiny.build(family)
    pruned = prune(model, name)
    model.generate(**tiny.inputs(family), max_new_tokens=2)
    freed = weakref.ref(model)
    del model, pruned
    gc.collect()
    assert freed() is None
    assert len(routes._routed) == before, "and no route of it stays behind"


def test_later_patches_of_others_stay_and_earlier_ones_do_not_come_back():
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    untouched = oracle.run(model, batch, max_new_tokens=4).logits
    pruned = prune(model, "fopru_rank")
    ours = model.prepare_inputs_for_generation
    called = []

    def theirs(*args, **kwargs):
        called.append(1)
        return ours(*args, **kwargs)

    model.prepare_inputs_for_generation = theirs
    pruned.remove()
    assert model.prepare_inputs_for_generation is theirs
    assert torch.equal(oracle.run(model, batch, max_new_tokens=4).logits, untouched), "ours passes on what it gets"
    assert called
    del model.prepare_inputs_for_generation

    model.prepare_inputs_for_generation = theirs_first = types.MethodType(
        type(model).prepare_inputs_for_generation, model
    )
    pruned = prune(model, "fopru_rank")
    del model.prepare_inputs_for_generation  # they take theirs off, and ours with it
    pruned.remove()
    assert model.__dict__.get("prepare_inputs_for_generation") is not theirs_first


def test_a_pruned_model_is_not_pickled_without_a_word(tmp_path):
    model = tiny.build("llava")
    with prune(model, "plphp"):
        with pytest.raises(foveate.UnsupportedError, match="cannot be pickled"):
            torch.save(model, tmp_path / "model.pt")
        model.save_pretrained(tmp_path / "weights")
    torch.save(model, tmp_path / "model.pt")  # after the block it can be
    assert torch.load(tmp_path / "model.pt", weights_only=False).config.to_dict() == model.config.to_dict()


@torch.no_grad()
def test_the_note_of_an_aborted_generate_is_of_no_other_forward():
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    with prune(model, "fastv") as pruned:
        expected, kept = model(**batch, logits_to_keep=5).logits, pruned.report.layers[-1].kept
        handle = model.register_forward_pre_hook(lambda *args: 1 / 0, prepend=True)
        with pytest.raises(ZeroDivisionError):
            model.generate(**batch, max_new_tokens=4)
        handle.remove()
        assert torch.equal(model(**batch, logits_to_keep=5).logits, expected)
        assert torch.equal(pruned.report.layers[-1].kept, kept)


@pytest.mark.parametrize(("family", "name"), [p for p in PLACES if p[0] in ("llava", "llava_next")])  # Qwen's own fails
def test_the_report_under_guidance_is_that_of_the_prompt(family, name):
    batch, model = tiny.inputs(family), tiny.build(family)
    negative = {"negative_prompt_ids": batch["input_ids"][:, -4:]}
    with prune(model, name) as pruned:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        expected = pruned.report.to_dict()
        model.generate(**batch, **negative, guidance_scale=1.5, max_new_tokens=3, do_sample=False)
        assert pruned.report.to_dict() == expected
        words = batch["input_ids"][:, -6:]
        model.generate(input_ids=words, max_new_tokens=2, do_sample=False)
        assert pruned.report.images == [[]], "a prompt of words is a prefill, too"


# -- parts of other models ----------------------------------------------------------------------------------------

SAME = {key: tiny.LLM[key] for key in tiny.LLM if key != "num_key_value_heads"}
LATENT = dict(
    num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=1,
)  # fmt: skip


def llava_of(attn="sdpa", text=None, vision=None, **options):
    config = tiny.config("llava")
    parts = dict(vision_config=vision or config.vision_config, text_config=text or config.text_config)
    model = LlavaForConditionalGeneration(LlavaConfig(**parts, image_token_index=tiny.IMAGE, **options)).eval()
    randomize(model, 0, 1.5)
    model.generation_config = tiny.build("llava").generation_config
    model.set_attn_implementation(attn)
    return model.requires_grad_(False)


@pytest.mark.parametrize("config", [PhiConfig, PersimmonConfig])
@pytest.mark.parametrize("name", ["fopru_rank", "fastv", "plphp"])
def test_decoders_with_another_name_for_their_norm(config, name):
    text, batch = config(**tiny.LLM), tiny.inputs("llava", **tiny.BATCHES["ragged"])
    run, report = pruned_run(llava_of(text=text), name, batch, **oracle.GREEDY)
    assert any(kept < tokens for row in report.images for tokens, kept in row)
    hides = hidden(report, batch["input_ids"].shape[1])
    assert oracle.errors(llava_of("eager", text=text), batch, run, hides).max() < TOLERANCE


def test_decoders_without_the_usual_parts_are_refused():
    model = llava_of(text=GPTNeoXConfig(**SAME))
    before = snapshot(model)
    for name in ("fopru_rank", "plphp"):
        with pytest.raises(foveate.UnsupportedError, match="gpt_neox decoder"):
            prune(model, name)
    assert changes(before, snapshot(model)) == []


def test_one_compressed_entry_for_all_heads():
    model, batch = llava_of(text=DeepseekV3Config(**SAME, **LATENT)), tiny.inputs("llava")
    with prune(model, "fopru_rank") as pruned:
        model.generate(**batch, max_new_tokens=2)
    assert pruned.report.images == [[(36, 9)]]
    dense = llava_of("eager", text=DeepseekV3Config(**SAME, **LATENT))
    for name in ("plphp", "plphp_fixed", "csp", "visual_snapkv"):
        run, report = pruned_run(model, name, batch, **oracle.GREEDY)
        assert any(kept < tokens for row in report.images for tokens, kept in row)
        assert oracle.errors(dense, batch, run, hidden(report, batch["input_ids"].shape[1])).max() < TOLERANCE
    layer = getattr(model(**batch), tiny.CACHE).layers[0]
    if layer.keys.shape[1] == 1:  # before 5.24 every head's entries are held
        with foveate.prune(model, "zipvl", keep=0.5):
            model.generate(**batch, max_new_tokens=2)
        refused = pytest.raises(foveate.UnsupportedError, match="one compressed entry for all heads")
        with foveate.prune(model, "running_sum", keep=0.5), refused:
            model.generate(**batch, max_new_tokens=2)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_encoders_of_unknown_layout_are_refused_for_that_reason(strategy):
    vision = Dinov2Config(**tiny.VISION, image_size=24, patch_size=4)
    model = llava_of(vision=vision, vision_feature_layer=-1, vision_feature_select_strategy=strategy)
    with pytest.raises(foveate.UnsupportedError, match="'dinov2' lays image tokens out in a way foveate does not know"):
        prune(model, "fopru_rank")


# -- prompts as they come -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("images", [(1,), (1, 1), (1, 2)])
def test_a_guide_may_be_asked_about_a_prompt_that_ends_in_a_picture(family, threshold, images):
    """Nothing of the prompt reads the picture then; what is generated does."""
    batch = tiny.inputs(family, images=images, text=(0,) * len(images), between=0)
    model = tiny.build(family)
    with foveate.prune(
        model, foveate.SGL(guide=guide_of(family), keep=0.5, exit_threshold=threshold), record=True
    ) as p:
        out = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert out.shape[0] == len(images)
    assert p.guided.exited or all(kept < tokens for row in p.report.images for tokens, kept in row)


@pytest.mark.parametrize(("family", "name"), [f for f in in_decoder if f[0] != "qwen2_5_vl"])  # refuses such masks
@pytest.mark.sampled(5)
def test_image_tokens_that_the_mask_hides_are_no_candidates(family, name):
    """Budgets count what can be seen, and logits equal the dense reference's."""
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    at = image_tokens(batch)[0].nonzero()[:, 0]
    batch["attention_mask"][0, at[::3]] = 0
    run, report = pruned_run(model, name, batch, **oracle.GREEDY)
    hides = hidden(report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() < TOLERANCE
    for layer in report.layers:
        assert not (layer.kept[0][:, at[::3]] & ~batch["attention_mask"][0, at[::3]].bool()).any()


# -- defaults of the process --------------------------------------------------------------------------------------


@pytest.fixture
def other_default():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("family", "name"), [f for f in FITS if f[0] in ("llava", "mllama")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
@pytest.mark.sampled(5)
def test_what_is_kept_does_not_follow_the_default_dtype(family, name, dtype, other_default):
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    with prune(model, name) as pruned:
        expected = model(**batch).logits
        kept = [layer.kept for layer in pruned.report.layers]
        other_default(dtype)
        logits = model(**batch).logits
    assert all(torch.equal(a.kept, b) for a, b in zip(pruned.report.layers, kept, strict=True))
    assert (logits - expected).abs().max() < 0.05, "the model itself makes a few masks in the default dtype"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_draws_do_not_follow_the_defaults(dtype, other_default):
    present = torch.ones(2, 9, dtype=torch.bool)
    expected, scores = seeded(3, 7), drawn(present, 3, 2)
    other_default(dtype)
    with torch.device("meta"):
        assert torch.equal(seeded(3, 7), expected)
    assert torch.equal(drawn(present, 3, 2), scores) and scores.dtype == torch.float32


# -- an answer that is scored in one forward ----------------------------------------------------------------------

SCORED = [(family, name) for family, name in FITS if family == "llava" or (family, name) in PLACES]
ANSWER = 4


def with_answers(batch, seed=0):
    """The batch with an answer behind each prompt, as one forward takes it, and the sequences."""
    rng = torch.Generator().manual_seed(seed)
    answer = torch.randint(3, tiny.TEXT, (len(batch["input_ids"]), ANSWER), generator=rng)
    longer = batch | {"input_ids": torch.cat([batch["input_ids"], answer], 1)}
    longer["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(answer)], 1)
    if "mm_token_type_ids" in batch:
        longer["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(answer).int()], 1)
    if "cross_attention_mask" in batch:
        seen = batch["cross_attention_mask"]
        longer["cross_attention_mask"] = torch.cat([seen, seen[:, -1:].expand(-1, ANSWER, -1, -1)], 1)
    if "mm_token_type_ids" not in batch:  # as generate() counts; Qwen counts by itself
        longer["position_ids"] = (longer["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return longer


@pytest.mark.parametrize("size", tiny.BATCHES)
@pytest.mark.parametrize(("family", "name"), SCORED)
@torch.no_grad()
@pytest.mark.sampled(5)
def test_an_answer_in_one_forward_is_scored_as_generate_would(family, name, size):
    batch, model = tiny.inputs(family, **tiny.BATCHES[size]), tiny.build(family)
    prompt = batch["input_ids"].shape[1]
    with prune(model, name) as pruned:
        kept = []
        for seed in (0, 1):
            longer = with_answers(batch, seed)
            replay = oracle.Replay(longer["input_ids"])
            expected = oracle.run(model, batch, max_new_tokens=ANSWER, logits_processor=[replay]).logits
            report, images = pruned.report.to_dict(), pruned.report.images
            with pruned.prompt(prompt):
                out = model(**longer, use_cache=True)
            assert out.logits.shape[1] == prompt + ANSWER
            assert (out.logits[:, prompt - 1 : -1] - expected).abs().max() < TOLERANCE
            assert pruned.report.images == images, "what was kept is what generate() keeps"
            # Before the LLM nothing asks where the prompt ends, and the forward stays one.
            assert name in BEFORE_LLM or pruned.report.to_dict() == report
            labels = longer["input_ids"].clone()
            labels[:, :prompt] = -100
            scored = model(**longer, labels=labels, use_cache=True)
            assert (scored.logits - out.logits).abs().max() < TOLERANCE and scored.loss.isfinite()
            kept.append([layer.kept for layer in pruned.report.layers])
        assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True)), "whatever the answer"


@decoder_places
@torch.no_grad()
def test_logits_of_a_whole_forward_are_warned_of_where_an_answer_could_choose(family, name, recwarn):
    batch, model = tiny.inputs(family), tiny.build(family)
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    with prune(model, name) as pruned:
        model(**batch)
        told = [str(warning.message) for warning in recwarn.list if "scored" in str(warning.message)]
        assert len(told) == (name != "fopru_rank"), "what is chosen before the LLM asks no prompt"
        recwarn.clear()
        model(**batch, logits_to_keep=1)
        model(**batch, labels=labels)
        model.generate(**batch, max_new_tokens=2)
        with pruned.prompt(batch["input_ids"].shape[1] - 1):
            model(**batch)
        assert not recwarn.list


@torch.no_grad()
def test_where_the_prompt_ends_must_be_one_place():
    batch, model = tiny.inputs("llava", **tiny.BATCHES["ragged"]), tiny.build("llava")
    longer = with_answers(batch)
    labels = longer["input_ids"].clone()
    labels[:, :-ANSWER] = -100
    labels[1, -ANSWER] = -100
    with prune(model, "plphp") as pruned:
        with pytest.raises(foveate.UnsupportedError, match="begin at different places"):
            model(**longer, labels=labels)
        with pytest.raises(foveate.UnsupportedError, match="a picture stands behind the end"), pruned.prompt(2):
            model(**longer)
        for bad in (0, -1, True, 2.0, None):
            with pytest.raises(ValueError, match="at least 1 token"), pruned.prompt(bad):
                pass
        with pytest.raises(ValueError, match="was said to have 500 tokens"), pruned.prompt(500):
            model(**longer)
        everything = model(**longer, labels=longer["input_ids"]).loss  # labels everywhere: no prompt is told apart
        assert everything.isfinite()
    with prune(model, "fopru_rank"):
        assert model(**longer, labels=labels).loss.isfinite(), "what is chosen before the LLM asks no prompt"
