"""SparseVLM with recycling, against an untouched eager model that does the same arithmetic on full tensors.

The reference reads its own embeddings, attention maps and hidden states, chooses and clusters with plain loops, puts
the means where the centres stood, and hides everything else from there on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import oracle
import pytest
import tiny
import torch
from cases import TOLERANCE, image_tokens
from test_maths_layers import slow_density_peaks
from test_merging_cache import image_spans, pruned, runs
from torch import Tensor

import foveate

FAR = 1e-2  # what a mistake costs at least
families = pytest.mark.parametrize("family", tiny.CORE_DECODERS)
batches = pytest.mark.parametrize("batch", tiny.BATCHES)
STAGES = (1, 2, 3)


class Dense:
    """What a plain model's layers do when SparseVLM recycles.

    alive: for each layer bool (rows, length), once the prompt has been read.
    """

    def __init__(
        self, family: str, batch: dict, images: tuple[int, ...], keep: float | int, recycle: float, merges: bool = True
    ) -> None:
        self.model, self.batch = tiny.build(family, "eager"), batch
        self.spans = image_spans(family, batch, images)
        self.keep, self.recycle, self.merges = keep, recycle, merges
        self.hides: list[oracle.Hide] = []
        self.alive: list[Tensor] = []
        is_image, valid = image_tokens(batch), batch["attention_mask"].bool()
        last = valid.shape[1] - 1
        self.text = [
            [t for t in range(last + 1) if valid[b, t] and is_image[b, :t].any() and not is_image[b, t]] or [last]
            for b in range(len(valid))
        ]

    def logits(self, sequences: Tensor) -> Tensor:
        """Replay sequences: (sequences, steps, vocab)."""
        self.hides.clear()
        self.copies = len(sequences) // len(self.batch["input_ids"])
        self.alive = [self.batch["attention_mask"].bool().repeat_interleave(self.copies, 0)]
        with self.recycling():
            return oracle.dense_logits(self.model, self.batch, sequences, self.hides)[0]

    @contextmanager
    def recycling(self) -> Iterator[None]:
        def enter(index: int):
            def hook(module, args, kwargs):
                hidden = args[0] if args else kwargs["hidden_states"]
                if hidden.shape[1] == 1:  # a decoding step
                    return None
                if index == 0:
                    self.embedded = hidden
                    return None
                new = self.stage(STAGES.index(index), hidden.clone())
                return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

            return hook

        def note(module, args, output):
            if output[1].shape[2] > 1:
                self.attention = output[1]

        layers = self.model.model.language_model.layers
        handles = [layers[i].register_forward_pre_hook(enter(i), with_kwargs=True) for i in (0, *STAGES)]
        handles += [layers[i - 1].self_attn.register_forward_hook(note) for i in STAGES]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def stage(self, stage: int, hidden: Tensor) -> Tensor:
        before, after = self.alive[-1], self.alive[-1].clone()
        for row in range(len(hidden)):
            mine = [(every, choice) for b, every, choice in self.spans if b == row // self.copies]
            there = [k for _, choice in mine for k in choice if before[row, k]]
            for every, choice in mine:
                candidates = [k for k in choice if before[row, k]]
                share = min(1.0, self.keep / len(every)) if isinstance(self.keep, int) else self.keep
                whole = math.floor(share ** ((stage + 1) / len(STAGES)) * len(every) + 1e-4)
                budget = min(max(1, whole - (len(every) - len(choice))), len(candidates))
                kept, clusters = self.choose(row, self.score(row, candidates, there), budget, hidden[row].clone())
                for k in candidates:
                    after[row, k] = k in kept or k in clusters
                for center, members in clusters.items():
                    if self.merges:
                        hidden[row, center] = torch.stack([self.states[k] for k in members]).mean(0)
        self.alive.append(after)
        for layer in range(STAGES[stage], len(self.model.model.language_model.layers)):
            self.hides.append(oracle.Hide(layer, ~after.unsqueeze(1)))
        return hidden

    def score(self, row: int, candidates: list[int], there: list[int]) -> dict[int, float]:
        """What the raters pay to each candidate; `there`: all of the sample's image tokens."""
        text = self.text[row // self.copies]
        logits = self.embedded[row, there] @ self.embedded[row, text].T
        relevance = logits.softmax(-1).mean(0).tolist()
        who = [t for t, value in zip(text, relevance, strict=True) if value > sum(relevance) / len(text)]
        seen = [t for t in who if t > candidates[0]] or [text[-1]]
        return {k: float(self.attention[row][:, seen, k].mean(0).sum()) for k in candidates}

    def choose(
        self, row: int, scores: dict[int, float], budget: int, states: Tensor
    ) -> tuple[list[int], dict[int, list[int]]]:
        """What stays by its score, and the members of each centre."""
        self.states = states
        gone = len(scores) - budget
        size = math.floor(self.recycle * gone + 1e-6) + 1
        clusters = min(size // 10 + 1, budget - 1) if gone else 0
        order = sorted(scores, key=lambda k: (-scores[k], k))
        if not clusters:
            return order[:budget], {}
        pool = order[budget - clusters :][:size]
        apart = [[float((states[i] - states[j]).square().mean().sqrt()) for j in pool] for i in pool]
        centers, member = slow_density_peaks(apart, clusters)
        members = {pool[c]: [pool[i] for i, m in enumerate(member) if m == n] for n, c in enumerate(centers)}
        return order[: budget - clusters], members


OPTIONS = {"most": (0.25, 1.0), "published": (0.5, 0.3), "number": (9, 0.5)}


@families
@batches
@pytest.mark.parametrize(("options", "attn", "decoding"), runs(*OPTIONS))
@pytest.mark.sampled(5)
def test_recycling_equals_a_plain_model_merged_by_hand(family, batch, options, attn, decoding):
    spec, decoding = tiny.BATCHES[batch], oracle.DECODING[decoding]
    batch, (keep, recycle) = tiny.inputs(family, **spec), OPTIONS[options]
    run, report = pruned(family, batch, foveate.SparseVLM(keep=keep, recycle=recycle), decoding, attn)
    dense = Dense(family, batch, spec["images"], keep, recycle)
    logits = dense.logits(run.sequences)
    for layer, alive in zip(report.layers, dense.alive, strict=True):
        kept = layer.kept[:: decoding.get("num_beams", 1), 0]
        assert torch.equal(kept, alive), "the eager model's own arithmetic chooses the same tokens"
    assert (logits - run.logits).abs().max() < TOLERANCE
    dropped = Dense(family, batch, spec["images"], keep, recycle, merges=False)
    assert (dropped.logits(run.sequences) - run.logits).abs().max() > FAR, "dropped, not merged"


@families
@batches
def test_keeping_everything_changes_nothing_at_all(family, batch):
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family)
    untouched = oracle.run(model, batch, **oracle.GREEDY)
    for keep in (1.0, 1000):
        with foveate.prune(model, "sparsevlm", keep=keep, recycle=0.3):
            assert torch.equal(oracle.run(model, batch, **oracle.GREEDY).logits, untouched.logits)
