"""The rows of the test matrix: each method, where it fits, and options that prune a tiny model clearly."""

from __future__ import annotations

from typing import Any

import oracle
import tiny
import torch

import foveate

# name in the matrix -> (method, options); keep times the size of every llava and Qwen image is a whole number
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fopru_rank": ("fopru", dict(keep=0.25, strategy="rank")),
    "fopru_row": ("fopru", dict(keep=0.5, strategy="row")),
    "fopru_cls": ("fopru", dict(keep=0.25, attention="cls", back=1)),
    "plphp": ("plphp", dict(keep=0.5, start_layer=1, delta=0.3)),
    "fastv": ("fastv", dict(keep=0.5, layer=2)),
    "random": ("random", dict(keep=0.25)),
    "uniform": ("uniform", dict(keep=0.25)),
    "vtc_cls": ("vtc_cls", dict(keep=0.25)),
    "divprune": ("divprune", dict(keep=0.25)),
    "scope": ("scope", dict(keep=0.25)),
    "mmtok": ("mmtok", dict(keep=0.25)),
    "cdpruner": ("cdpruner", dict(keep=0.25)),
    "apet": ("apet", dict(keep=0.25, basis=4)),
    "pyramiddrop": ("pyramiddrop", dict(keep=0.25)),
    "gsearch": ("gsearch", dict(keep=0.5)),
    "gsearch_none_left": ("gsearch", dict(rates=(0.75, 0.5, 0.0))),
    "psigmoid": ("psigmoid", dict(keep=0.5)),
    "psigmoid_text": ("psigmoid", dict(keep=0.25, floor=0.1, rows="text")),
    "sparsevlm": ("sparsevlm", dict(keep=0.25)),
    "dart": ("dart", dict(keep=0.5, layer=2)),
    "topv": ("topv", dict(keep=0.5, layer=2)),
    "v2drop": ("v2drop", dict(keep=0.5)),
    "adaptinfer": ("adaptinfer", dict(keep=0.25)),
    # Thresholds of one's own let PLPHP evict layer by layer; its defaults compare all layers first.
    "plphp_last": ("plphp", dict(keep=0.5, rows=1)),
    "plphp_fixed": ("plphp", dict(keep=0.5, start_layer=0, alpha=0.6, beta=0.3)),
    "visual_snapkv": ("visual_snapkv", dict(keep=0.5, window=8)),
    "mixkv": ("mixkv", dict(keep=0.5, window=8)),
    "prefixkv": ("prefixkv", dict(keep=0.5)),
    "csp": ("csp", dict(keep=0.5, window=0.3)),
    # Scores of one's own fit one model alone.
    "sparsemm": ("sparsemm", dict(keep=0.5, window=8, heads="random")),
    "aircache": ("aircache", dict(keep=0.5)),
    "trimmed_llama": ("trimmed_llama", dict(keep=0.1)),
}
METHODS["random_layer"] = ("random_layer", dict(keep=0.5))
METHODS["random_cache"] = ("random_cache", dict(keep=0.5))
METHODS["random_cross"] = ("random_cross", dict(keep=0.25))
IN_CROSS_ATTENTION = ("trimmed_llama", "random_cross")
BEFORE_LLM = ("fopru_rank", "fopru_row", "fopru_cls", "random", "uniform", "vtc_cls", "divprune")
BEFORE_LLM += ("scope", "mmtok", "cdpruner", "apet")
FITS = [(family, name) for family in tiny.CORE_DECODERS for name in METHODS if name not in IN_CROSS_ATTENTION]
FITS += [("mllama", name) for name in IN_CROSS_ATTENTION]
# One method for each place where tokens can go: before the LLM, inside it, in the cache, in cross-attention.
PLACES = [(family, name) for family, name in FITS if name in ("fopru_rank", "fastv", "plphp", "trimmed_llama")]
# Methods that act around generate(), or merge, are proven in files of their own.
OWN_FILES = {
    "sgl": "test_guided.py",
    "videollm_mod": "test_depth.py",
    "mint": "test_contrast.py",
    "visionzip": "test_merging_encoder.py",
    "pooling": "test_merging_encoder.py",
    "vistog": "test_vistog.py",
    "zipvl": "test_merging_cache.py",
    "elastic_cache": "test_merging_cache.py",
    **dict.fromkeys(("attention_predictor", "last_step", "running_sum", "pages", "per_turn"), "test_decode.py"),
    "quecc": "test_quecc.py",
    **dict.fromkeys(("evs", "vidcom2", "dycoke", "random_clip", "uniform_frames"), "test_video.py"),
    **dict.fromkeys(("fastvid", "holitom"), "test_merging_video.py"),
}
# Of families beyond the core: where a method of each kind reads, chooses and drops.
SAMPLED = ("fopru_rank", "divprune", "random", "fastv", "plphp", "csp")
TOLERANCE = 1e-4


def prune(model, name: str, *, record: bool = True, **options):
    """Prune with the options of the matrix, some of them replaced."""
    method, defaults = METHODS[name]
    return foveate.prune(model, method, record=record, **(defaults | options))


def pruned_run(model, name: str, batch: dict, seed: int = 0, **kwargs) -> tuple[oracle.Run, Any]:
    """Generate once under a method: the run and its report."""
    with prune(model, name) as pruned:
        run = oracle.run(model, batch, seed, **kwargs)
        return run, pruned.report


def relative_errors(family: str, batch: dict, run: oracle.Run, report: Any) -> torch.Tensor:
    """The largest logit difference of each step to the reference that fits the decoder, by the largest logit.

    In units of what the family rounds: to be below TOLERANCE.
    """
    if any(layer.kind == "state" for layer in report.layers) and all(x.since == "prefill" for x in report.layers):
        error = oracle.short_errors(tiny.build(family), batch, run, report)
    else:
        hides = oracle.hidden(report, batch["input_ids"].shape[1])
        error = oracle.errors(tiny.build(family, "eager"), batch, run, hides)
    return error / run.logits.abs().max() / tiny.found[family].rounding


def check_second_turn(model, name: str, batch: dict, image: bool, variant: str = "") -> tuple[list[oracle.Hide], Any]:
    """Go on after a pruned turn, compare with the dense reference, and return what was hidden and reported."""
    dense = tiny.build(variant or model.config.model_type, "eager")
    with prune(model, name) as pruned:
        # An answer that holds a placeholder by chance would be an image of the next prompt.
        first = oracle.run(model, batch, max_new_tokens=6, suppress_tokens=[tiny.of(model).image_id])
        hides = oracle.hidden(pruned.report, batch["input_ids"].shape[1])
        turn = tiny.next_turn(model, batch, first.sequences, image)
        second = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=8)
        later = pruned.report
    _, cache = oracle.dense_logits(dense, batch, first.sequences, hides)
    hides = hides + oracle.hidden(later, turn["input_ids"].shape[1])
    error = oracle.errors(dense, turn | {tiny.CACHE: cache}, second, hides)
    assert error.max() / max(1.0, second.logits.abs().max()) < TOLERANCE
    for layer in second.cache.layers:
        # One that borrows holds none; that of a window holds, as transformers' own, a view from one step to the next.
        if getattr(layer, "is_sliding", True):
            continue
        for tensor in (layer.keys, layer.values):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return hides, later


def image_tokens(batch: dict) -> torch.Tensor:
    """Return which prompt positions hold an image token."""
    return batch["input_ids"] == tiny.IMAGE
