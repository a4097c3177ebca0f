"""Methods that look ahead see the queries and keys with which the next layer would run on all tokens."""

from __future__ import annotations

from dataclasses import dataclass

import oracle
import pytest
import tiny
import torch

import foveate
from foveate.engine.attention import Attention
from foveate.methods.base import LayerMethod

LAYER = 2
families = pytest.mark.parametrize("family", tiny.CORE_DECODERS)
seen: list[torch.Tensor] = []


@dataclass
class Recorder(LayerMethod):
    """Drops nothing; writes down what the last token would attend to."""

    name = "recorder"
    summary = source = ""
    looks_ahead = True
    keep: float | int = 0.5

    def stages(self, depth):
        return (LAYER,)

    def select(self, tokens):
        assert tokens.layer == LAYER
        seen.append(tokens.attention(tokens.last.unsqueeze(1))[:, :, 0])
        return tokens.groups.present


def layers_own(model, batch):
    """Attention of the last token in the layer, as an untouched eager model runs it."""
    return model(**batch, output_attentions=True).attentions[LAYER][:, :, -1]


@families
@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@torch.no_grad()
def test_it_is_the_attention_of_the_layer_itself(family, batch, attn):
    batch = tiny.inputs(family, **tiny.BATCHES[batch])
    expected = layers_own(tiny.build(family, "eager"), batch)
    model = tiny.build(family, attn)
    untouched = model(**batch).logits
    seen.clear()
    with foveate.prune(model, Recorder()):
        assert torch.equal(model(**batch).logits, untouched), "a look changes nothing"
    (found,) = seen
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@families
@pytest.mark.parametrize("text", [(4,), (4, 9)])
@torch.no_grad()
def test_earlier_turns_stand_in_front(family, text, monkeypatch):
    """Also one whose image was pruned: the layer holds fewer entries of it."""
    batch, model = tiny.inputs(family, images=(1, 2)[: len(text)], text=text), tiny.build(family)
    ran, run = [], Attention.run

    def spy(attention):
        if attention.index == LAYER and attention.forward.groups is not None:
            tokens = attention.tokens
            ran.append(tokens.attention(tokens.last.unsqueeze(1))[:, :, 0])
        return run(attention)

    monkeypatch.setattr(Attention, "run", spy)
    seen.clear()
    with foveate.prune(model, [foveate.get_method("uniform", keep=0.5), Recorder()]):
        first = oracle.run(model, batch, max_new_tokens=3)
        turn = tiny.next_turn(model, batch, first.sequences, image=True)
        oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=3)
    assert len(seen) == len(ran) == 2
    for looked, real in zip(seen, ran, strict=True):
        torch.testing.assert_close(looked, real, atol=1e-6, rtol=1e-5)


@families
@torch.no_grad()
def test_an_attention_that_nobody_can_see_is_refused(family):
    batch, model = tiny.inputs(family), tiny.build(family)
    attention = model.model.language_model.layers[LAYER].self_attn
    attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    with foveate.prune(model, Recorder()), pytest.raises(foveate.UnsupportedError, match="layer 2 does not ask"):
        model(**batch)
