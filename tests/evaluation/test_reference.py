"""The oracle itself, without foveate: it must be right before it may judge anything."""

import oracle
import pytest
import tiny
import torch
from oracle import Hide

DECODING = oracle.DECODING | {"beam_sample": oracle.BEAM_SAMPLE}
TOLERANCE = 2e-5


def random_keep(shape: tuple[int, ...], count: int, prunable: torch.Tensor, seed: int) -> torch.Tensor:
    """Return a mask that drops `count` of the prunable positions, others in every head."""
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~prunable, -1)
    return torch.ones(shape, dtype=torch.bool).scatter(-1, noise.topk(count, dim=-1).indices, False)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.parametrize("family", tiny.CORE)
@pytest.mark.sampled(5)
def test_hiding_nothing_gives_the_untouched_logits(family, batch, decoding, attn):
    batch = tiny.inputs(family, **tiny.BATCHES[batch])
    untouched = oracle.run(tiny.build(family, attn), batch, **DECODING[decoding])
    assert untouched.logits.shape[1] == oracle.STEPS
    assert oracle.errors(tiny.build(family, "eager"), batch, untouched, []).max() < TOLERANCE


@pytest.mark.parametrize("family", tiny.CORE)
def test_every_image_key_matters(family):
    """One hidden key of one layer moves the logits far beyond the tolerance, or the oracle would be blind."""
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family, "eager")
    untouched = oracle.run(model, batch, **oracle.GREEDY)
    if family == "mllama":
        layers, keys = (1, 3, 5), torch.zeros(3, 1, 68 * 2, dtype=torch.bool)
        keys[:, :, 5] = True
    else:
        layers, keys = range(4), torch.zeros_like(batch["input_ids"], dtype=torch.bool)[:, None]
        for row, first in enumerate((batch["input_ids"] == tiny.IMAGE).int().argmax(1)):
            keys[row, :, first + 5] = True
    for layer in layers:
        assert oracle.errors(model, batch, untouched, [Hide(layer, keys)]).max() > 1e-2


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
def test_hidden_in_every_layer_is_a_shorter_prompt(family):
    """Hiding a token everywhere, from all queries, is never having passed it, its position left free."""
    batch, model = tiny.inputs(family), tiny.build(family, "eager")
    ids = batch["input_ids"]
    keep = random_keep(ids.shape, 10, ids == tiny.IMAGE, seed=1)
    untouched = oracle.run(model, batch, **oracle.GREEDY)
    hides = [Hide(layer, ~keep[:, None]) for layer in range(4)]
    dense, _ = oracle.dense_logits(model, batch, untouched.sequences, hides)

    embeds, positions = oracle.embedded(model, batch)
    for compact, close in ((False, True), (True, False)):
        where = positions[..., : int(keep.sum())] if compact else positions[..., keep[0]]
        short = model.model.language_model(inputs_embeds=embeds[keep][None], position_ids=where)
        error = (model.lm_head(short.last_hidden_state[:, -1]) - dense[:, 0]).abs().max()
        assert (error < TOLERANCE) if close else (error > 1e-2)


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
def test_hidden_while_decoding_is_an_evicted_key(family):
    """Hiding keys from later steps only, per KV head, is the same as gathering them out of a plain cache."""
    batch, model = tiny.inputs(family), tiny.build(family, "eager")
    ids = batch["input_ids"]
    untouched = oracle.run(model, batch, **oracle.GREEDY)
    keeps = [random_keep((1, 2, ids.shape[1]), 9, (ids == tiny.IMAGE)[:, None], seed) for seed in range(4)]
    hides = [Hide(layer, ~keep, first_query=ids.shape[1]) for layer, keep in enumerate(keeps)]
    dense, _ = oracle.dense_logits(model, batch, untouched.sequences, hides)
    assert torch.equal(dense[:, 0], untouched.logits[:, 0])

    _, positions = oracle.embedded(model, batch)
    cache = model(**batch, use_cache=True).past_key_values
    for layer, keep in zip(cache.layers, keeps, strict=True):
        layer.keys = layer.keys[keep].view(1, 2, -1, 16)
        layer.values = layer.values[keep].view(1, 2, -1, 16)
    for step, token in enumerate(untouched.sequences[0, ids.shape[1] : -1], start=1):
        out = model.model.language_model(
            inputs_embeds=model.get_input_embeddings()(token[None, None]),
            position_ids=positions[..., -1:] + step,
            **{tiny.CACHE: cache},
        )
        assert (model.lm_head(out.last_hidden_state[:, -1]) - dense[:, step]).abs().max() < TOLERANCE


def test_trimmed_cross_attention_is_a_shorter_image():
    """For mllama: features hidden in the later cross layers are features that were never there."""
    batch, model = tiny.inputs("mllama"), tiny.build("mllama", "eager")
    keep = random_keep((1, 1, 68), 20, torch.ones(68, dtype=torch.bool), seed=3)
    untouched = oracle.run(model, batch, **oracle.GREEDY)
    dense, _ = oracle.dense_logits(model, batch, untouched.sequences, [Hide(layer, ~keep) for layer in (3, 5)])

    def trim(module, args, kwargs):
        if (states := kwargs["cross_attention_states"]) is not None:
            kwargs["cross_attention_states"] = states.flatten(0, -2)[None][:, keep[0, 0]]
        kwargs["attention_mask"] = kwargs["attention_mask"][..., keep[0, 0]]
        return args, kwargs

    for layer in (3, 5):
        model.model.language_model.layers[layer].cross_attn.register_forward_pre_hook(trim, with_kwargs=True)
    assert (
        oracle.errors(model, batch, oracle.Run(untouched.sequences, dense, untouched.rows, None), []).max() < TOLERANCE
    )


def test_inputs_are_what_their_names_say():
    for family in tiny.CORE:
        batch = tiny.inputs(family, **tiny.BATCHES["ragged"])
        counts = tiny.image_counts(family, tiny.BATCHES["ragged"]["images"])
        assert batch["attention_mask"].sum(1).unique().numel() == 3, "rows of different length"
        assert (batch["attention_mask"].diff(dim=1) >= 0).all(), "padded on the left"
        if family != "mllama":
            assert (batch["input_ids"] == tiny.IMAGE).sum(1).tolist() == [sum(row) for row in counts]
        if family in ("llava_next", "qwen2_5_vl"):
            assert len({n for row in counts for n in row}) > 1, "images of different size"
