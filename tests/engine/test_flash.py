"""What flash attention would be given, watched on a CPU by a stand-in with its calling convention."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from cases import FITS, METHODS, PLACES, TOLERANCE, check_second_turn, pruned_run
from oracle import hidden
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

import foveate

pytestmark = pytest.mark.sampled(5)

# mllama does not support flash attention, and heads that differ are refused.
flash_fits = pytest.mark.parametrize(("family", "name"), [f for f in FITS if f[0] != "mllama" and f[1] != "sparsemm"])


class Flash:
    """Attention as transformers calls flash kernels, in plain maths; strict about what they forbid."""

    def __init__(self):
        self.lengths: list[tuple[int, int]] = []  # (queries, keys) of each causal call

    def __call__(self, module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
        assert attention_mask is None or attention_mask.ndim == 2, "flash takes no 4-D mask"
        causal = kwargs.get("is_causal")
        causal = module.is_causal if causal is None else causal
        batch, _, queries, _ = query.shape
        keys = key.shape[2]
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        if causal:
            self.lengths.append((queries, keys))
        allowed = torch.ones(batch, queries, keys, dtype=torch.bool)
        if causal:  # aligned at the last query and key, as flash-attn >= 2.1 does
            allowed &= torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        if (bounds := kwargs.get("cu_seq_lens_q")) is not None:
            part = torch.bucketize(torch.arange(queries), bounds[1:], right=True)
            allowed &= part[:, None] == part
        if attention_mask is not None:
            assert attention_mask.shape == (batch, keys), "one entry a key"
            allowed = self.unpadded(attention_mask.bool(), queries, causal) & allowed
        elif batch == 1 and queries > 1 and (positions := kwargs.get("position_ids")) is not None:
            gaps = positions - positions.min() - torch.arange(queries)
            assert not gaps.any(), "flash would take this prompt for packed sequences"
        scores = query @ key.transpose(2, 3) * kwargs["scaling"]
        scores = scores.masked_fill(~allowed[:, None], torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    @staticmethod
    def unpadded(mask: Tensor, queries: int, causal: bool) -> Tensor:
        """Flash cuts padding out of queries and keys first, and aligns what is left at its end."""
        allowed = torch.zeros(*mask.shape[:1], queries, mask.shape[1], dtype=torch.bool)
        for b, row in enumerate(mask):
            k = row.nonzero().flatten()
            q = row[-queries:].nonzero().flatten()
            inner = torch.ones(len(q), len(k), dtype=torch.bool)
            if causal:
                inner = inner.tril(len(k) - len(q))
            allowed[b, q[:, None], k] = inner
        return allowed


@pytest.fixture
def flash(monkeypatch) -> Flash:
    kernel = Flash()
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", kernel)
    return kernel


def flash_model(family: str):
    """Name flash in the configs; the usual way wants the package to be installed."""
    model = tiny.build(family)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "flash_attention_2"
    return model


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
@pytest.mark.parametrize("batch", tiny.BATCHES)
def test_the_stand_in_agrees_with_eager(family, batch, flash):
    batch = tiny.inputs(family, **tiny.BATCHES[batch])
    untouched = oracle.run(flash_model(family), batch, **oracle.GREEDY)
    assert flash.lengths
    assert oracle.errors(tiny.build(family, "eager"), batch, untouched, []).max() < TOLERANCE


@flash_fits
@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.parametrize("decoding", ["greedy", "beams"])
@pytest.mark.sampled(8)
def test_flash_equals_the_dense_reference(family, name, batch, decoding, flash):
    batch = tiny.inputs(family, **tiny.BATCHES[batch])
    run, report = pruned_run(flash_model(family), name, batch, **oracle.DECODING[decoding])
    hides = hidden(report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() < TOLERANCE
    # The kernel really worked on the short tensors.
    assert min(keys for queries, keys in flash.lengths if queries == 1) < batch["input_ids"].shape[1]
    prompts = {queries for queries, keys in flash.lengths if queries > 1}
    assert (min(prompts) < batch["input_ids"].shape[1]) == (foveate.method_class(METHODS[name][0]).place != "cache")


@pytest.mark.parametrize(("family", "name"), [p for p in PLACES if p[0] != "mllama"])
@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_a_second_turn_under_flash_equals_the_dense_reference(family, name, batch, image, flash):
    """Many queries meet more keys, some of them fillers: the case where flash aligns masks in its own way."""
    check_second_turn(flash_model(family), name, tiny.inputs(family, **tiny.BATCHES[batch]), image)
    assert any(1 < queries < keys for queries, keys in flash.lengths)
