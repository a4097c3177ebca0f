"""VideoLLM-MoD, against an untouched eager model in which the skipped tokens' keys are hidden and their rows put back.

In a routed layer the reference lets every row run, hides the keys of what skips it from all queries, and then takes
`h + w * (layer(h) - h)` where a token went through, and `h` where it did not. It scores the tokens itself, with plain
loops.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from cases import TOLERANCE
from oracle import Hide
from safetensors.torch import load_file
from test_merging_cache import image_spans, runs
from torch import Tensor

import foveate
from foveate.engine.target import fingerprint
from foveate.methods.trained import write_plugin
from foveate.methods.videollm_mod import VideoLLMMoD

FAR = 1e-2  # what a mistake costs at least
families = pytest.mark.parametrize("family", tiny.CORE_DECODERS)
batches = pytest.mark.parametrize("batch", tiny.BATCHES)
backends = pytest.mark.parametrize("attn", ["eager", "sdpa"])
Spans = list[tuple[int, list[int], list[int]]]
# keep, routed layers of four; the last layer is among both
OPTIONS = {"interleaved": (0.25, (1, 3)), "all": (0.5, (0, 1, 2, 3)), "number": (9, (1, 2))}
VARIANTS = [v for v in tiny.VARIANTS if tiny.found[v].model_type in tiny.CORE and v != "llava_cls"]


FOLDER = tempfile.TemporaryDirectory()


@lru_cache(typed=True)  # 1 token is not all of them, 1.0
def trained(family: str, keep: float | int = 0.25, layers: tuple[int, ...] = (1, 3), scale: float = 1.0) -> VideoLLMMoD:
    """A method with a random router for a tiny model, as a file of weights would bring it."""
    path = Path(FOLDER.name) / f"{family}-{keep!r}-{'-'.join(map(str, layers))}-{scale}.safetensors"
    method, rng = VideoLLMMoD(keep=keep, layers=layers, weights=path), torch.Generator().manual_seed(7)
    tensors = {}
    for layer in layers:
        tensors[f"{layer}.weight"] = torch.randn(tiny.LLM["hidden_size"], generator=rng) * 0.3 * scale
        tensors[f"{layer}.bias"] = torch.randn((), generator=rng) * scale
    write_plugin(path, method, family, fingerprint(tiny.build(family).model), tensors)
    return method


def router(method: VideoLLMMoD, layer: int) -> tuple[Tensor, Tensor]:
    tensors = load_file(str(method.weights))
    return tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]


class Dense:
    """A plain model whose layers are routed by hand.

    skipped: for each routed layer bool (rows, length), what skipped it. alive: for each layer bool (rows, length), what
    other methods left, None for everything. mistake: a way to be wrong.
    """

    def __init__(self, family: str, method: VideoLLMMoD, mistake: str | None = None) -> None:
        self.model, self.method, self.mistake = tiny.build(family, "eager"), method, mistake
        self.hides: list[Hide] = []
        self.skipped: dict[int, Tensor] = {}
        self.alive: dict[int, Tensor] = {}
        self.spans: Spans = []
        self.past = 0

    def choose(self, layer: int, states: Tensor, every: list[int], choice: list[int]) -> dict[int, float]:
        """What goes through of one image, and the weight of each."""
        keep = self.method.keep
        whole = keep if isinstance(keep, int) else math.floor(keep * len(every) + 1e-4)
        budget = min(max(1, whole - (len(every) - len(choice))), len(choice))
        weight, bias = router(self.method, layer)
        scores = {k: float(states[k] @ weight + bias) for k in choice}
        order = sorted(choice, key=lambda k: (-scores[k], k))
        chosen = order[-budget:] if self.mistake == "the worst tokens" else order[:budget]
        return {k: 1.0 if self.mistake == "no weight" else 0.2 * math.tanh(scores[k]) + 1 for k in chosen}

    @contextmanager
    def routing(self, copies: int) -> Iterator[None]:
        entered: dict[int, Tensor] = {}
        weights: dict[int, Tensor] = {}

        def enter(layer: int):
            def hook(module, args):
                hidden = args[0]
                if hidden.shape[1] == 1 or not self.spans:  # a decoding step
                    return
                weight = torch.ones(hidden.shape[:2])
                for row in range(len(hidden)):
                    for b, every, choice in self.spans:
                        if b == row // copies:
                            alive = self.alive.get(layer)
                            there = every if alive is None else [k for k in every if alive[row, k + self.past]]
                            through = self.choose(layer, hidden[row], there, [k for k in choice if k in there])
                            for k in every:
                                weight[row, k] = 1.0 if k in there and k not in choice else through.get(k, 0.0)
                entered[layer], weights[layer] = hidden, weight
                self.skipped[layer] = torch.nn.functional.pad(weight == 0, (self.past, 0))
                self.hides.append(Hide(layer, self.skipped[layer].unsqueeze(1)))

            return hook

        def leave(layer: int):
            def hook(module, args, output):
                if layer not in entered:
                    return None
                weight, hidden = weights.pop(layer).unsqueeze(-1), entered.pop(layer)
                if self.mistake == "nothing comes back":
                    return output * (weight > 0)
                if self.mistake == "nothing skips":
                    return output
                return torch.where(weight > 0, hidden + weight * (output - hidden), hidden)

            return hook

        layers = self.model.model.language_model.layers
        handles = [layers[i].register_forward_pre_hook(enter(i)) for i in self.method.layers]
        handles += [layers[i].register_forward_hook(leave(i)) for i in self.method.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, batch: dict, spans: Spans, sequences: Tensor, past: int = 0) -> tuple[Tensor, object]:
        """Replay a turn: logits (sequences, steps, vocab), and the cache. past: tokens of earlier turns."""
        self.spans, self.past = spans, past
        copies = len(sequences) // len(batch["input_ids"])
        with self.routing(copies):
            return oracle.dense_logits(self.model, batch, sequences, self.hides)


def routed(model, method, batch: dict, **kwargs) -> tuple[oracle.Run, foveate.PruneReport]:
    with foveate.prune(model, method, record=True) as pruned:
        return oracle.run(model, batch, **kwargs), pruned.report


def check(family: str, method: VideoLLMMoD, batch: dict, spec: dict, attn: str = "sdpa", **decoding) -> float:
    """Compare a run with the one by hand, and return the largest difference."""
    run, report = routed(tiny.build(family, attn), method, batch, **decoding)
    dense = Dense(family, method)
    logits, _ = dense.logits(batch, image_spans(family, batch, spec["images"]), run.sequences)
    real = batch["attention_mask"].bool()
    for layer in report.layers:
        kept = layer.kept[:: len(layer.kept) // len(real), 0]
        left = real
        if layer.index in method.layers:
            left = real & ~dense.skipped[layer.index][:: len(run.sequences) // len(real)]
            assert not torch.equal(left, real), "something skips it"
        assert layer.since == "prefill" and torch.equal(kept, left), "the plain model's arithmetic chooses the same"
    worst = (logits - run.logits).abs().max()
    assert worst < TOLERANCE
    return float(worst)


@families
@batches
@pytest.mark.parametrize(("options", "attn", "decoding"), runs(*OPTIONS))
@pytest.mark.sampled(5)
def test_logits_equal_a_plain_model_routed_by_hand(family, batch, options, attn, decoding):
    spec, method = tiny.BATCHES[batch], trained(family, *OPTIONS[options])
    check(family, method, tiny.inputs(family, **spec), spec, attn, **oracle.DECODING[decoding])


@families
@batches
def test_beam_sampling_equals_a_plain_model_routed_by_hand(family, batch):
    spec = tiny.BATCHES[batch]
    check(family, trained(family), tiny.inputs(family, **spec), spec, **oracle.BEAM_SAMPLE)


@families
@backends
def test_rows_without_an_image_and_images_side_by_side(family, attn):
    spec = dict(images=(1, 0, 2), text=(3, 6, 4))
    check(family, trained(family), tiny.inputs(family, **spec), spec, attn, **oracle.GREEDY)
    check(family, trained(family), tiny.inputs(family, (2,), between=0), dict(images=(2,)), attn, **oracle.GREEDY)


@pytest.mark.parametrize(
    "variant", [v for v in tiny.VARIANTS if tiny.found[v].model_type in tiny.CORE and v != "llava_cls"]
)
@backends
def test_other_encoders_and_decoders(variant, attn):
    spec = tiny.BATCHES["ragged"]
    check(variant, trained(variant), tiny.inputs(variant, **spec), spec, attn, **oracle.GREEDY)


@families
@pytest.mark.parametrize("keep", [1, 0.01, 0.99])
def test_extremes(family, keep):
    spec = tiny.BATCHES["ragged"]
    check(family, trained(family, keep), tiny.inputs(family, **spec), spec, **oracle.GREEDY)


@families
@pytest.mark.parametrize("mistake", ["nothing comes back", "nothing skips", "the worst tokens", "no weight"])
def test_the_reference_sees_a_mistake(family, mistake):
    spec, method = tiny.BATCHES["one"], trained(family)
    batch = tiny.inputs(family, **spec)
    run, _ = routed(tiny.build(family), method, batch, **oracle.GREEDY)
    logits, _ = Dense(family, method, mistake).logits(batch, image_spans(family, batch, spec["images"]), run.sequences)
    assert (logits - run.logits).abs().max() > FAR


@families
@batches
@pytest.mark.parametrize("decoding", oracle.DECODING)
def test_where_all_tokens_go_through_nothing_changes_at_all(family, batch, decoding):
    """At weights of 1, which an untrained router gives, and whatever it says at keep=1.0."""
    batch, decoding = tiny.inputs(family, **tiny.BATCHES[batch]), oracle.DECODING[decoding]
    untouched = oracle.run(tiny.build(family), batch, **decoding)
    for method in (trained(family, 1000, scale=0.0), trained(family, 1.0), VideoLLMMoD(keep=1000, router="random")):
        run, report = routed(tiny.build(family), method, batch, **decoding)
        assert torch.equal(run.logits, untouched.logits) and torch.equal(run.sequences, untouched.sequences)
        assert report.kv_bytes == report.kv_bytes_unpruned


@families
def test_a_layer_that_all_go_through_still_weighs_them(family):
    spec = tiny.BATCHES["ragged"]
    batch, method = tiny.inputs(family, **spec), trained(family, 1000)
    run, _ = routed(tiny.build(family), method, batch, **oracle.GREEDY)
    logits, _ = Dense(family, method).logits(batch, image_spans(family, batch, spec["images"]), run.sequences)
    assert (logits - run.logits).abs().max() < TOLERANCE
    assert (oracle.run(tiny.build(family), batch, **oracle.GREEDY).logits - run.logits).abs().max() > FAR


@families
@batches
def test_routed_layers_hold_what_went_through_and_no_byte_more(family, batch):
    spec, method = tiny.BATCHES[batch], trained(family)
    batch, model = tiny.inputs(family, **spec), tiny.build(family)
    run, report = routed(model, method, batch, max_new_tokens=1)
    counts = tiny.image_counts(family, spec["images"])
    through = [[max(1, math.floor(0.25 * n + 1e-4)) for n in row] for row in counts]
    real = batch["attention_mask"].sum(1).tolist()
    left = max(n - sum(row) + sum(kept) for n, row, kept in zip(real, counts, through, strict=True))
    for layer, held in zip(report.layers, run.cache.layers, strict=True):
        assert layer.kept_length == (left if layer.index in method.layers else layer.length) == held.keys.shape[2]
        for tensor in (held.keys, held.values):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    size = len(real) * 2 * 2 * 16 * 4  # keys and values of 2 heads of 16 float32
    assert report.kv_bytes == size * (2 * left + 2 * batch["input_ids"].shape[1])
    assert report.kv_bytes_unpruned == size * 4 * batch["input_ids"].shape[1]
    assert report.images == [list(zip(*pair, strict=True)) for pair in zip(counts, through, strict=True)]
