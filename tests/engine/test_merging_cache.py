"""Cache methods that do more than hide keys, against plain models that do the same arithmetic on full tensors.

Elastic Cache merges entries and evicts while decoding: the reference prefills an untouched eager model, chooses from
its attention maps, rebuilds its plain cache entry by entry, and decodes token by token. ZipVL silences rows: the
reference hides the same keys for all queries and zeroes what the attention of these rows hands to its projection.
"""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from cases import TOLERANCE, image_tokens
from oracle import hidden, seen_and_kept
from torch import Tensor
from transformers import DynamicCache

import foveate

FAR = 1e-2  # what a mistake costs at least
families = pytest.mark.parametrize("family", tiny.CORE_DECODERS)
batches = pytest.mark.parametrize("batch", tiny.BATCHES)
# Every kernel and way of decoding under the first options, and the other options under one of them.
RUNS = [("eager", "greedy"), ("eager", "beams"), ("sdpa", "greedy"), ("sdpa", "beams")]


def runs(first, *others):
    """Pairs of options and how to run them."""
    return [(first, *run) for run in RUNS] + [(other, "sdpa", "greedy") for other in others]


def pruned(family: str, batch: dict, method, decoding: dict, attn: str = "sdpa"):
    """Generate under a method: the run, and the report of its prefill."""
    model = tiny.build(family, attn)
    with foveate.prune(model, method, record=True) as handle:
        return oracle.run(model, batch, **decoding), handle.report


# Elastic Cache -----------------------------------------------------------------------------------------------


def image_spans(
    family: str, batch: dict, images: tuple[int, ...], seed: int = 0
) -> list[tuple[int, list[int], list[int]]]:
    """Row, all tokens and choosable tokens of every image; newline tokens of tiled models are no choice."""
    tokens, model = image_tokens(batch), tiny.build(family)
    newline = getattr(model.model, "image_newline", None)
    structure = torch.zeros_like(tokens)
    if newline is not None:
        structure = (oracle.embedded(model, batch)[0] == newline).all(-1)
    spans = []
    for b, counts in enumerate(tiny.image_counts(family, images, seed)):
        for span in tokens[b].nonzero().flatten().split(counts):
            spans.append((b, span.tolist(), span[~structure[b, span]].tolist()))
    return spans


class Dense:
    """Entries of a plain model's cache, row by row, and what Elastic Cache does to them."""

    def __init__(
        self,
        family: str,
        batch: dict,
        images: tuple[int, ...],
        keep: float,
        merges: bool = True,
        seen: list[Tensor] | None = None,
    ) -> None:
        """seen: for each layer bool (batch, 1, length), what a method in front left."""
        self.model, self.batch = tiny.build(family, "eager"), batch
        _, positions = oracle.embedded(self.model, batch)
        hides = [oracle.Hide(i, ~of_layer) for i, of_layer in enumerate(seen or ())]
        with torch.no_grad(), oracle.masked(self.model, hides):
            out = self.model(**batch, position_ids=positions, use_cache=True, output_attentions=True)
        self.first_logits = out.logits[:, -1]
        valid = batch["attention_mask"].bool()
        self.next_position = [int(positions[..., b, :][..., valid[b]].max()) + 1 for b in range(len(valid))]
        self.kept: list[Tensor] = []  # by layer
        self.entries: list[list[tuple[Tensor, Tensor]]] = []  # [layer][row]: keys and values, (kv_heads, slots, d)
        spans = image_spans(family, batch, images)
        for i, (layer, attention) in enumerate(zip(getattr(out, tiny.CACHE).layers, out.attentions, strict=True)):
            kept = valid.clone() if seen is None else seen[i][:, 0] & valid
            received = (attention.mean(1) * kept.unsqueeze(-1)).sum(1)
            keys, values = layer.keys.clone(), layer.values.clone()
            for b, every, choosable in spans:
                span, choice = ([k for k in part if kept[b, k]] for part in (every, choosable))
                budget = max(1, int(keep * len(span) + 1e-6) - (len(span) - len(choice)))
                best = sorted(choice, key=lambda k: (-float(received[b, k]), k))[:budget]
                joined: dict[int, list[int]] = {k: [k] for k in best}
                for k in set(choice) - set(best):
                    kept[b, k] = False
                    joined[min(best, key=lambda j: (abs(j - k), j))].append(k)
                if merges:
                    for k, parts in joined.items():
                        keys[b, :, k] = layer.keys[b][:, parts].mean(1)
                        values[b, :, k] = layer.values[b][:, parts].mean(1)
            self.kept.append(kept)
            self.entries.append([(keys[b][:, kept[b]], values[b][:, kept[b]]) for b in range(len(valid))])

    def logits(self, run: oracle.Run, distance: int | None, beams: int = 1) -> Tensor:
        """Replay the sequences of a run. Returns (sequences, steps, vocab)."""
        # The prefill of a beam search has a row a beam.
        rows = [row // beams for row in run.rows.tolist()]
        entries = [[of_layer[b] for b in rows] for of_layer in self.entries]
        lengths = [[keys.shape[1] for keys, _ in of_layer] for of_layer in entries]
        logits = [self.first_logits[rows]]
        prompt = self.batch["input_ids"].shape[1]
        for step in range(run.sequences.shape[1] - prompt - 1):
            position = torch.tensor([[self.next_position[b] + step] for b in rows])
            if self.model.config.model_type == "qwen2_5_vl":
                position = position.expand(3, -1, -1)
            out, cache = self.step(run.sequences[:, prompt + step, None], position, entries)
            logits.append(out)
            for of_layer, layer, before in zip(entries, cache.layers, lengths, strict=True):
                for i, pair in enumerate(of_layer):
                    new = (layer.keys[i, :, -1:], layer.values[i, :, -1:])
                    held = [torch.cat(parts, 1) for parts in zip(pair, new, strict=True)]
                    if distance is not None:
                        point = before[i] - distance
                        held = [torch.cat([part[:, :point], part[:, point + 1 :]], 1) for part in held]
                    of_layer[i] = held
        return torch.stack(logits, 1)

    @torch.no_grad()
    def step(self, token: Tensor, position: Tensor, entries: list[list[tuple[Tensor, Tensor]]]):
        """One token through the plain model: its logits and a plain cache, shorter rows padded on the left."""
        cache, handles = DynamicCache(config=self.model.config.get_text_config()), []
        for index, of_layer in enumerate(entries):
            longest = max(keys.shape[1] for keys, _ in of_layer)
            gaps = [longest - keys.shape[1] for keys, _ in of_layer]
            padded = [
                [torch.nn.functional.pad(part, (0, 0, gap, 0)) for part in pair]
                for pair, gap in zip(of_layer, gaps, strict=True)
            ]
            cache.update(*(torch.stack(parts) for parts in zip(*padded, strict=True)), index)
            mask = torch.zeros(len(gaps), 1, 1, longest + 1)
            for row, gap in enumerate(gaps):
                mask[row, ..., :gap] = torch.finfo(mask.dtype).min
            # Layers differ in length, and a plain model has one mask for all.
            hook = lambda m, a, k, mask=mask: (a, k | {"attention_mask": mask})  # noqa: E731
            attention = self.model.model.language_model.layers[index].self_attn
            handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            out = self.model(input_ids=token, position_ids=position, **{tiny.CACHE: cache})
        finally:
            for handle in handles:
                handle.remove()
        return out.logits[:, -1], cache


@families
@batches
@pytest.mark.parametrize(("distance", "attn", "decoding"), runs(5, None, 12))
@pytest.mark.sampled(5)
def test_elastic_cache_equals_a_plain_cache_merged_by_hand(family, batch, distance, attn, decoding):
    """With 12 the last evicted entries are generated tokens."""
    spec, decoding = tiny.BATCHES[batch], oracle.DECODING[decoding]
    beams = decoding.get("num_beams", 1)
    batch = tiny.inputs(family, **spec)
    method = foveate.ElasticCache(keep=0.75, decode_distance=distance)
    run, report = pruned(family, batch, method, decoding, attn)
    dense = Dense(family, batch, spec["images"], 0.75)
    for layer, kept in zip(report.layers, dense.kept, strict=True):
        assert torch.equal(layer.kept[::beams, 0], kept), "the eager model's attention maps choose the same tokens"
    assert (dense.logits(run, distance, beams) - run.logits).abs().max() < TOLERANCE


IN_FRONT = {"fopru": foveate.FoPru(keep=0.6), "fastv": foveate.FastV(keep=0.5, layer=2)}


@families
@batches
@pytest.mark.parametrize("first", IN_FRONT)
def test_elastic_cache_behind_another_method(family, batch, first):
    """`keep` then refers to what the other method left, and a merge never reaches what it dropped."""
    spec = tiny.BATCHES[batch]
    batch = tiny.inputs(family, **spec)
    methods = [IN_FRONT[first], foveate.ElasticCache(keep=0.5, decode_distance=5)]
    run, report = pruned(family, batch, methods, oracle.GREEDY)
    dense = Dense(family, batch, spec["images"], 0.5, seen=[layer.seen for layer in report.layers])
    for layer, kept in zip(report.layers, dense.kept, strict=True):
        assert torch.equal(layer.kept[:, 0], kept)
    assert (dense.logits(run, 5) - run.logits).abs().max() < TOLERANCE


@families
@batches
def test_the_elastic_reference_would_see_a_mistake(family, batch):
    spec = tiny.BATCHES[batch]
    batch = tiny.inputs(family, **spec)
    run, _ = pruned(family, batch, foveate.ElasticCache(keep=0.5, decode_distance=5), oracle.GREEDY)
    dense = Dense(family, batch, spec["images"], 0.5)
    assert (dense.logits(run, 5) - run.logits).abs().max() < TOLERANCE
    assert (dense.logits(run, 6) - run.logits).abs().max() > FAR, "evicted one slot too early"
    assert (dense.logits(run, None) - run.logits).abs().max() > FAR, "evicted nothing"
    dropped = Dense(family, batch, spec["images"], 0.5, merges=False)
    assert (dropped.logits(run, 5) - run.logits).abs().max() > FAR, "dropped, not merged"


@families
def test_elastic_cache_holds_its_length_while_decoding(family):
    model, batch = tiny.build(family), tiny.inputs(family)
    for distance, growth in ((5, 0), (None, 1)):
        with foveate.prune(model, foveate.ElasticCache(keep=0.5, decode_distance=distance)):
            short, long = (oracle.run(model, batch, max_new_tokens=n).cache for n in (2, 9))
        for one, two in zip(short.layers, long.layers, strict=True):
            assert two.keys.shape[2] - one.keys.shape[2] == 7 * growth
            assert two.keys.untyped_storage().nbytes() == two.keys.numel() * two.keys.element_size()


# ZipVL -------------------------------------------------------------------------------------------------------


ZIPVL = {
    "cap": foveate.ZipVL(keep=0.5, threshold=1.0),
    "threshold": foveate.ZipVL(keep=0.99, threshold=0.8, probes=6),
    "both": foveate.ZipVL(keep=9, threshold=0.6),
}


@families
@batches
@pytest.mark.parametrize(("options", "attn", "decoding"), runs(*ZIPVL))
@pytest.mark.sampled(5)
def test_zipvl_equals_a_plain_model_with_silent_rows(family, batch, options, attn, decoding):
    batch = tiny.inputs(family, **tiny.BATCHES[batch])
    run, report = pruned(family, batch, ZIPVL[options], oracle.DECODING[decoding], attn)
    assert all(layer.since == "prefill" and layer.kept_length < layer.length for layer in report.layers)
    hides, dense = hidden(report, batch["input_ids"].shape[1]), tiny.build(family, "eager")
    with oracle.silenced(dense, report, run.rows):
        assert oracle.errors(dense, batch, run, hides).max() < TOLERANCE
    assert oracle.errors(dense, batch, run, hides).max() > FAR, "dropped rows that attend are a mistake it would see"


@families
@batches
@pytest.mark.parametrize("first", IN_FRONT)
def test_zipvl_behind_another_method(family, batch, first):
    batch = tiny.inputs(family, **tiny.BATCHES[batch])
    run, report = pruned(family, batch, [IN_FRONT[first], ZIPVL["cap"]], oracle.GREEDY)
    hides, dense = seen_and_kept(report, batch["input_ids"].shape[1]), tiny.build(family, "eager")
    with oracle.silenced(dense, report, run.rows):
        assert oracle.errors(dense, batch, run, hides).max() < TOLERANCE


@families
@batches
def test_zipvl_goes_on_with_another_image(family, batch):
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family)
    with foveate.prune(model, ZIPVL["both"], record=True) as handle:
        first = oracle.run(model, batch, max_new_tokens=6)
        report = handle.report
        turn = tiny.next_turn(model, batch, first.sequences, image=True)
        second = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=8)
        later = handle.report
    dense = tiny.build(family, "eager")
    hides = hidden(report, batch["input_ids"].shape[1])
    with oracle.silenced(dense, report, first.rows):
        _, cache = oracle.dense_logits(dense, batch, first.sequences, hides)
    hides += hidden(later, turn["input_ids"].shape[1])
    with oracle.silenced(dense, later, second.rows):
        assert oracle.errors(dense, turn | {tiny.CACHE: cache}, second, hides).max() < TOLERANCE
    assert all(layer.kept_length < layer.length for layer in later.layers)


@families
@batches
def test_zipvl_chooses_what_the_probes_of_a_plain_model_look_at(family, batch):
    """Layer 0, before any row is silent: the same tokens as the eager model's own attention map names."""
    spec = tiny.BATCHES[batch]
    batch = tiny.inputs(family, **spec)
    _, report = pruned(family, batch, foveate.ZipVL(keep=0.99, threshold=0.8, probes=6), {"max_new_tokens": 1})
    with torch.no_grad():
        attention = tiny.build(family, "eager")(**batch, output_attentions=True).attentions[0].mean(1)
    length = attention.shape[-1]
    probes = [[r for r in range(length - 6, length) if batch["attention_mask"][b, r]] for b in range(len(attention))]
    for b, span, choice in image_spans(family, batch, spec["images"]):
        mass = {k: float(attention[b, probes[b], k].sum()) for k in choice}
        ordered = sorted(mass.values(), reverse=True)
        needed = next(p for p in range(1, len(ordered) + 1) if sum(ordered[:p]) >= 0.8 * sum(ordered))
        most = int(0.99 * len(span) + 1e-6) - (len(span) - len(choice))
        per_probe = {k: mass[k] / max(1, sum(r >= k for r in probes[b])) for k in choice}
        best = sorted(choice, key=lambda k: (-per_probe[k], k))[: min(needed, most)]
        kept = report.layers[0].kept[b, 0]
        assert [k for k in choice if kept[k]] == sorted(best)


@families
def test_zipvl_prunes_layers_by_what_they_look_at(family):
    """The threshold alone gives layers different lengths; a cap makes them equal."""
    batch = tiny.inputs(family)
    for options, equal in (("threshold", False), ("cap", True)):
        _, report = pruned(family, batch, ZIPVL[options], {"max_new_tokens": 1})
        assert (len({layer.kept_length for layer in report.layers}) == 1) == equal


@families
@batches
@pytest.mark.parametrize("method", ["zipvl", "elastic_cache"])
def test_keeping_everything_changes_nothing_at_all(family, batch, method):
    batch, model = tiny.inputs(family, **tiny.BATCHES[batch]), tiny.build(family)
    untouched = oracle.run(model, batch, **oracle.GREEDY)
    with foveate.prune(model, method, keep=1.0) as handle:
        run = oracle.run(model, batch, **oracle.GREEDY)
    assert torch.equal(run.logits, untouched.logits)
    assert all(layer.kept_length == layer.length for layer in handle.report.layers)


def test_assisted_decoding_is_refused_where_every_step_evicts():
    """A step that checks several guesses is one step; what it accepts would not have been evicted for."""
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    untouched = oracle.run(model, batch, **oracle.GREEDY)
    evicting = foveate.prune(model, "elastic_cache", keep=0.5, decode_distance=5)
    with evicting, pytest.raises(foveate.UnsupportedError, match="decode_distance=None"):
        oracle.run(model, batch, **oracle.GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(oracle.run(model, batch, **oracle.GREEDY).logits, untouched.logits)
    with foveate.prune(model, "elastic_cache", keep=0.5, decode_distance=None):
        plain = oracle.run(model, batch, **oracle.GREEDY)
        lookup = oracle.run(model, batch, **oracle.GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(plain.sequences, lookup.sequences)
