"""What cannot be pruned correctly is refused before anything changes, and says what to do instead."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from cases import BEFORE_LLM, FITS, IN_CROSS_ATTENTION, METHODS, OWN_FILES, PLACES, prune, pruned_run
from traces import changes, snapshot
from transformers import CONFIG_MAPPING, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

try:
    from transformers.cache_utils import BaseQuantizedLayer
except ImportError:  # before 5.24
    from transformers.cache_utils import QuantizedLayer as BaseQuantizedLayer

import foveate

places = pytest.mark.parametrize(("family", "name"), PLACES)
FAMILIES = sys.modules["foveate.families"]  # the name in foveate is a function
METHOD_NAMES = sorted({method for method, _ in METHODS.values()})


class QuantizedLayer(BaseQuantizedLayer):
    """A quantized cache layer without a quantization library."""

    def _quantize(self, tensor, axis=None):
        return tensor

    def _dequantize(self, q_tensor):
        return q_tensor


def offloaded(model) -> Cache:
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.offloading = True  # the constructor wants a GPU stream
    return cache


def quantized(model) -> Cache:
    return Cache(layers=[QuantizedLayer() for _ in model.model.language_model.layers])


@pytest.mark.parametrize(("family", "name"), [p for p in PLACES if p[1] not in BEFORE_LLM])
@pytest.mark.parametrize("kind", [offloaded, quantized])
def test_caches_that_cannot_be_pruned_are_refused(family, name, kind):
    batch, model = tiny.inputs(family), tiny.build(family)
    expected, _ = pruned_run(model, name, batch, max_new_tokens=4)
    before = snapshot(model)
    with prune(model, name):
        with pytest.raises(foveate.UnsupportedError, match=r"(?i)cache"):
            model.generate(**batch, max_new_tokens=4, **{tiny.CACHE: kind(model)})
        # The refusal cost nothing: the block still works.
        assert torch.equal(oracle.run(model, batch, max_new_tokens=4).logits, expected.logits)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize(("family", "name"), [p for p in PLACES if p[1] in ("plphp", "trimmed_llama")])
def test_cache_methods_need_a_cache(family, name):
    batch, model = tiny.inputs(family), tiny.build(family)
    with prune(model, name):
        with pytest.raises(foveate.UnsupportedError, match="use_cache"):
            model.generate(**batch, max_new_tokens=4, use_cache=False)
        with pytest.raises(foveate.UnsupportedError, match="use_cache"):
            model(**batch, use_cache=False)


@places
def test_a_cache_filled_by_an_unpruned_run_is_converted_or_refused(family, name):
    batch, model = tiny.inputs(family), tiny.build(family)
    first, again = (oracle.run(model, batch, max_new_tokens=6) for _ in range(2))
    turn = tiny.next_turn(model, batch, first.sequences)
    untouched = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=4)
    with prune(model, name):
        try:
            run = oracle.run(model, turn | {tiny.CACHE: again.cache}, max_new_tokens=4)
        except foveate.UnsupportedError as error:
            assert "cache" in str(error)
            return
    # A turn of text drops nothing, so a conversion must not change the answer.
    assert (run.logits - untouched.logits).abs().max() < 1e-4


@places
def test_a_pruned_cache_is_of_no_use_outside_the_block(family, name):
    batch, model = tiny.inputs(family), tiny.build(family)
    with prune(model, name):
        first = oracle.run(model, batch, max_new_tokens=4)
        turn = tiny.next_turn(model, batch, first.sequences)
    with pytest.raises(foveate.UnsupportedError, match="cache"):
        model.generate(**turn, max_new_tokens=4, **{tiny.CACHE: first.cache})


@places
@pytest.mark.parametrize("asked", ["output_attentions", "output_hidden_states"])
def test_tensors_of_every_layer_are_refused(family, name, asked):
    """Their lengths would differ from layer to layer."""
    batch, model = tiny.inputs(family), tiny.build(family, "eager")
    with prune(model, name), pytest.raises(foveate.UnsupportedError, match=asked):
        model.generate(**batch, max_new_tokens=2, return_dict_in_generate=True, **{asked: True})


@pytest.mark.parametrize(("family", "name"), [p for p in PLACES if p[0] != "mllama"])
def test_prompts_whose_image_tokens_cannot_be_found_are_refused(family, name):
    batch, model = tiny.inputs(family), tiny.build(family)
    embeds = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    with prune(model, name), pytest.raises(foveate.UnsupportedError, match="input_ids"):
        model.generate(**embeds, **{k: v for k, v in batch.items() if k != "input_ids"}, max_new_tokens=2)
    pixels = {k: batch[k] for k in batch.keys() & {"pixel_values", "image_sizes", "image_grid_thw"}}
    features = model.model.get_image_features(**pixels, return_dict=True)
    rest = {k: v for k, v in batch.items() if k != "pixel_values"}
    with prune(model, name), pytest.raises(foveate.UnsupportedError, match="encoded"):
        model.generate(**rest, mm_encoder_outputs={"image": features}, max_new_tokens=2)


@pytest.mark.parametrize("name", ["fastv", "topv", "plphp", "running_sum"])
def test_methods_that_find_no_layer_without_a_window_are_refused(name):
    model = tiny.build("llava_sliding")
    before = snapshot(model)
    with pytest.raises(foveate.UnsupportedError, match=r"whole prompt, .*before the LLM"):
        foveate.prune(model, name, keep=0.5)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("variant", ["llava_sliding", "llava_windows"])
def test_flash_attention_with_windows_is_refused(variant):
    model = tiny.build(variant)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(foveate.UnsupportedError, match=r"window.*sdpa"):
        foveate.prune(model, "fopru", keep=0.5)


def test_an_unknown_family_is_told_the_known_ones():
    model = LlamaForCausalLM(LlamaConfig(**tiny.LLM))
    before = snapshot(model)
    with pytest.raises(foveate.UnsupportedError) as error:
        foveate.prune(model, "fopru", keep=0.5)
    assert "'llama'" in str(error.value) and "mllama" in str(error.value), "the closest names are told"
    assert len(str(error.value)) < 400
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("thing", [None, "llava-hf/llava-1.5-7b-hf", torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises((foveate.UnsupportedError, TypeError)):
        foveate.prune(thing, "fopru", keep=0.5)


MISFITS = [("mllama", name) for name in METHODS if name not in IN_CROSS_ATTENTION]
MISFITS += [(family, name) for family in tiny.CORE_DECODERS for name in IN_CROSS_ATTENTION]


@pytest.mark.parametrize(("family", "name"), MISFITS)
def test_a_method_that_does_not_fit_the_family_is_refused(family, name):
    model = tiny.build(family)
    before = snapshot(model)
    with pytest.raises(foveate.UnsupportedError) as error:
        prune(model, name)
    assert family in str(error.value) and METHODS[name][0] in str(error.value).lower()
    assert changes(before, snapshot(model)) == []


@places
def test_a_pruned_model_is_not_pruned_again(family, name):
    batch, model = tiny.inputs(family), tiny.build(family)
    expected, _ = pruned_run(model, name, batch, max_new_tokens=4)
    with prune(model, name):
        with pytest.raises((foveate.UnsupportedError, ValueError), match=r"(?i)already|remove"):
            prune(model, name)
        assert torch.equal(oracle.run(model, batch, max_new_tokens=4).logits, expected.logits)


@pytest.mark.parametrize("together", [["fopru", "fopru"], ["random", "uniform"], []])
def test_combinations_without_sense_are_refused(together):
    model = tiny.build("llava")
    before = snapshot(model)
    with pytest.raises((foveate.UnsupportedError, ValueError)):
        foveate.prune(model, together)
    assert changes(before, snapshot(model)) == []


BAD_KEEPS = [0, 0.0, -1, -0.5, 1.5, 2.0, math.nan, math.inf, "x", "0.5", None, True, False, [0.5]]


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("keep", BAD_KEEPS, ids=repr)
@pytest.mark.sampled(8)
def test_a_bad_keep_is_told_the_allowed_range(method, keep):
    if keep is None and foveate.method_class(method).__dataclass_fields__["keep"].default is None:
        return  # there None stands for what other options say
    with pytest.raises(ValueError, match=re.escape("(0, 1]")) as error:
        foveate.get_method(method, keep=keep)
    assert "keep" in str(error.value) and str(keep) in str(error.value)


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("fopru", dict(strategy="column"), ["strategy", "rank", "row", "column"]),
        ("fopru", dict(strategy=None), ["strategy", "rank", "row"]),
        ("fastv", dict(layer=-1), ["layer", "-1"]),
        ("fastv", dict(layer=1.5), ["layer", "1.5"]),
        ("fastv", dict(layer="2"), ["layer"]),
        ("plphp", dict(delta=-0.1), ["delta", "-0.1"]),
        ("plphp", dict(delta=1.5), ["delta", "1.5"]),
        ("plphp", dict(delta=math.nan), ["delta"]),
        ("plphp", dict(start_layer=-1), ["start_layer", "-1"]),
        ("plphp", dict(alpha=0.1, beta=0.5), ["alpha", "beta"]),
        ("plphp", dict(alpha=-1.0, beta=-2.0), ["alpha"]),
        ("random", dict(seed="x"), ["seed"]),
    ],
)
def test_bad_options_are_told_what_is_allowed(method, options, told):
    with pytest.raises(ValueError) as error:
        foveate.get_method(method, keep=0.5, **options)
    assert all(word in str(error.value) for word in told), str(error.value)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_options_that_do_not_exist_are_named(method):
    with pytest.raises((ValueError, TypeError), match="ratio"):
        foveate.get_method(method, keep=0.5, ratio=0.3)


@pytest.mark.parametrize("name", ["zzz", None, 3])
def test_an_unknown_method_is_told_the_known_ones(name):
    with pytest.raises((ValueError, TypeError)) as error:
        foveate.prune(tiny.build("llava"), name, keep=0.5)
    assert all(method in str(error.value) for method in METHOD_NAMES)


@pytest.mark.parametrize(("name", "says"), [("scop", "did you mean scope"), ("", "write names"), ("FoPru!", "write")])
def test_a_method_that_is_nearly_one_is_told_what_is_meant(name, says):
    with pytest.raises(ValueError, match=says):
        foveate.prune(tiny.build("llava"), name, keep=0.5)


def test_options_beside_a_method_object_are_refused():
    with pytest.raises((ValueError, TypeError), match="keep"):
        foveate.prune(tiny.build("llava"), foveate.FoPru(keep=0.5), keep=0.25)


def test_a_layer_that_the_model_does_not_have_is_refused():
    model = tiny.build("llava")
    before = snapshot(model)
    for method in (
        foveate.get_method("fastv", keep=0.5, layer=4),
        foveate.get_method("plphp", start_layer=4),
    ):
        with pytest.raises((foveate.UnsupportedError, ValueError), match="layer"):
            foveate.prune(model, method)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_methods_travel_as_dicts_and_files(method, tmp_path):
    made = foveate.get_method(method, keep=0.3)
    assert type(made).from_dict(made.to_dict()) == made
    made.save_pretrained(tmp_path)
    assert (tmp_path / "foveate_config.json").is_file()
    assert type(made).from_pretrained(tmp_path) == made


def test_the_matrix_covers_every_method():
    """A method without a row in the matrix, or a file of its own, is not proven."""
    assert {*METHOD_NAMES, *OWN_FILES} == set(foveate.methods())
    for name, file in OWN_FILES.items():
        text = (Path(__file__).parent / file).read_text()
        assert name in text or foveate.method_class(name).__name__ in text
    assert {family for family, _ in FITS} == set(tiny.CORE)


def test_every_family_has_a_tiny_model():
    """A family without one is in no row of the matrix."""
    known = {name for name in FAMILIES._registry.built_in() if name in CONFIG_MAPPING}
    assert known == {tiny.found[name].model_type for name in tiny.FAMILIES}
