"""Models inside other things: compiled, with adapters, in a pipeline, and with a handle that got lost."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from cases import PLACES, TOLERANCE, prune, pruned_run
from traces import changes, snapshot

import foveate
from foveate import glimpse

places = pytest.mark.parametrize(("family", "name"), PLACES)
# Compiling takes long: of one family here, of the others among the longer checks.
compiled_places = pytest.mark.parametrize(
    ("family", "name"), [p if p[0] == "llava" else pytest.param(*p, marks=pytest.mark.slow) for p in PLACES]
)
adapters = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
dynamo = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, at its import


@dynamo
@compiled_places
@pytest.mark.parametrize("part", ["model.language_model.layers.1", pytest.param("", marks=pytest.mark.slow)])
def test_a_model_compiled_in_place_says_the_same(family, name, part):
    model = tiny.build(family)
    model.get_submodule(part).compile(backend="eager", dynamic=True)
    agrees(model, family, name)


@dynamo
@compiled_places
def test_a_compiled_model_is_pruned_inside_its_wrapper(family, name):
    model = torch.compile(tiny.build(family), backend="eager", dynamic=True)
    agrees(model, family, name)
    assert not isinstance(prune(model, name).model, type(model))
    foveate.restore(model)


@dynamo
def test_a_model_compiled_inside_the_block_says_the_same():
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    with prune(model, "plphp"):
        before = oracle.run(model, batch, max_new_tokens=3)
        model.model.language_model.layers[1].compile(backend="eager", dynamic=True)
        after = oracle.run(model, batch, max_new_tokens=3)
    assert torch.equal(before.sequences, after.sequences)
    assert (before.logits - after.logits).abs().max() < TOLERANCE


def agrees(model, family: str, name: str) -> None:
    """What the model, or its wrapper, says under the method is what the dense reference says."""
    torch._dynamo.reset()
    batch = tiny.inputs(family, **tiny.BATCHES["one"])
    run, report = pruned_run(model, name, batch, max_new_tokens=4)
    hides = oracle.hidden(report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() < TOLERANCE


# -- models inside other things -----------------------------------------------------------------------------------


def with_lora(family: str, attn: str = "sdpa"):
    peft = pytest.importorskip("peft")
    targets = r".*(language_model|decoder).*\.(q_proj|v_proj)"
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = tiny.build(family, attn)
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).eval()


@adapters
@places
def test_a_model_with_lora_is_pruned_through_its_adapters(family, name):
    model, dense = with_lora(family), with_lora(family, "eager")
    batch = tiny.inputs(family, **tiny.BATCHES["ragged"])
    plain = oracle.run(dense, batch, max_new_tokens=4)
    run, report = pruned_run(model, name, batch, max_new_tokens=4)
    assert not torch.equal(run.logits, plain.logits)
    hides = oracle.hidden(report, batch["input_ids"].shape[1])
    # The reference is replayed on the model inside, whose layers carry the adapters.
    assert oracle.errors(dense.get_base_model(), batch, run, hides).max() < TOLERANCE
    with model.disable_adapter():
        bare, report = pruned_run(model, name, batch, max_new_tokens=4)
    assert (
        oracle.errors(
            tiny.build(family, "eager"), batch, bare, oracle.hidden(report, batch["input_ids"].shape[1])
        ).max()
        < TOLERANCE
    )


@adapters
def test_prompt_tuning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=64, num_layers=4)
    model = tiny.build("llava")
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(foveate.UnsupportedError, match=r"prompt tuning .*LoRA"):
        foveate.prune(wrapped, "fopru", keep=0.5)


def test_a_pipeline_s_model_is_pruned():
    from transformers import pipeline

    model, processor = glimpse.load()
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    question = glimpse.heldout(1)[0]
    (picture,) = question.images
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question.question}]
    chat = [{"role": "user", "content": content}]

    def said():
        return pipe(text=chat, max_new_tokens=4, return_full_text=False)

    before = said()
    with foveate.prune(pipe, "fopru", keep=0.25) as pruned:
        said()
        assert pruned.report.images == [[(144, 36)]]
    assert said() == before


@places
def test_a_lost_handle_is_no_loss(family, name):
    model = tiny.build(family)
    before = snapshot(model)
    prune(model, name)
    with pytest.raises(foveate.UnsupportedError, match=r"foveate\.restore"):
        prune(model, name)
    foveate.restore(model)
    assert changes(before, snapshot(model)) == []
    foveate.restore(model)  # harmless
    with pytest.raises(foveate.UnsupportedError, match="takes a model, not a str"):
        foveate.restore("llava")
