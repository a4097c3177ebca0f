"""The tests' proof as figures: the largest logit difference between pruned models and their dense references.

    python benchmarks/proof.py

Every method on every core family that it fits, batch 1 and left-padded batch 3, greedy, beam search and sampling,
eager and sdpa, float32; methods that compare frames on videos. The tests assert the same limits; this records by how
much they are met.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import foveate
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.tables import markdown

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "engine"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "methods"))
import oracle
import test_contrast
import test_decode
import test_depth
import test_merging_cache
import test_merging_encoder
import test_merging_video
import test_quecc
import test_video
import test_vistog
import tiny
from cases import FITS, METHODS
from test_guided import guide_of

ON_VIDEO = [family for family in tiny.VIDEO_FAMILIES if family in tiny.CORE]
VIDEOS = {"one": {}, "ragged": test_video.BATCHES["ragged"]}
FOLDER = tempfile.TemporaryDirectory()

# The largest difference from the reference; and at keep = 1.0 from the untouched model, where that changes nothing.
Pair = tuple[float, float | None]
Case = Callable[[str, str, str], Pair]  # of a batch, an attention and a decoding


def masked(family: str, batch: dict, spec: dict, run: oracle.Run, report: Any) -> float:
    """The reference that hides keys."""
    model, hides = tiny.build(family, "eager"), oracle.hidden(report, batch["input_ids"].shape[1])
    return float(oracle.errors(model, batch, run, hides).max())


def silenced(family: str, batch: dict, spec: dict, run: oracle.Run, report: Any) -> float:
    """That, where the rows of dropped tokens fall silent, too."""
    model, hides = tiny.build(family, "eager"), oracle.hidden(report, batch["input_ids"].shape[1])
    with oracle.silenced(model, report, run.rows):
        return float(oracle.errors(model, batch, run, hides).max())


def masked_by_step(family: str, batch: dict, spec: dict, run: oracle.Run, report: Any) -> float:
    """That, with other keys hidden in every step."""
    hides = test_decode.read_steps(report, run, batch["input_ids"].shape[1])
    return float(test_decode.errors(tiny.build(family, "eager"), batch, run, hides).max())


def merged_in_encoder(name: str, family: str, batch: dict, spec: dict, run: oracle.Run, report: Any) -> float:
    """A plain model whose embeddings are merged by hand."""
    rows = run.rows // copies(batch, report)
    dense, _ = test_merging_encoder.reference(family, name, batch, spec["images"], run.sequences, rows)
    return float((dense - run.logits).abs().max())


def merged_in_cache(family: str, batch: dict, spec: dict, run: oracle.Run, report: Any) -> float:
    """A plain model whose keys and values are merged by hand."""
    options = DROPPING["elastic_cache"]
    plain = test_merging_cache.Dense(family, batch, spec["images"], options["keep"])
    dense = plain.logits(run, options["decode_distance"], copies(batch, report))
    return float((dense - run.logits).abs().max())


def copies(batch: dict, report: Any) -> int:
    """Rows that the prefill runs for a sample."""
    return len(report.layers[0].kept) // len(batch["input_ids"])


# Methods outside the matrix whose runs a reference can follow: their options.
DROPPING: dict[str, dict[str, Any]] = {
    "sgl": {"keep": 0.5, "layer": 2},
    "elastic_cache": {"keep": 0.75, "decode_distance": 5},
    "zipvl": {"keep": 0.5, "threshold": 1.0},
    **test_merging_encoder.METHODS,
    **test_decode.OPTIONS,
    **test_video.ACROSS,
}
REFERENCES: dict[str, Any] = {
    "elastic_cache": merged_in_cache,
    "zipvl": silenced,
    **{name: partial(merged_in_encoder, name) for name in test_merging_encoder.METHODS},
    **dict.fromkeys(test_decode.OPTIONS, masked_by_step),
}


def method_for(name: str, options: dict[str, Any], family: str, model: Any) -> Any:
    """With weights, or a guide, where it needs them."""
    if name in test_decode.OPTIONS:
        return test_decode.method_with(Path(FOLDER.name), name, model, **options)
    return foveate.get_method(name, **options | ({"guide": guide_of(family)} if name == "sgl" else {}))


def dropping(family: str, name: str, options: dict[str, Any], batch: str, attn: str, decoding: str) -> Pair:
    """A method whose run a reference follows."""
    on_video = name in test_video.ACROSS
    spec = VIDEOS[batch] if on_video else tiny.BATCHES[batch]
    inputs = (tiny.videos if on_video else tiny.inputs)(family, **spec)
    model, kwargs = tiny.build(family, attn), oracle.DECODING[decoding]
    with foveate.prune(model, method_for(name, options, family, model), record=True) as pruned:
        run = oracle.run(model, inputs, **kwargs)
    largest = REFERENCES.get(name, masked)(family, inputs, spec, run, pruned.report)
    return largest, keeping_all(model, method_for(name, options | {"keep": 1.0}, family, model), inputs, kwargs)


def keeping_all(model: Any, method: Any, inputs: dict, kwargs: dict[str, Any]) -> float:
    """The difference that a method makes to the untouched model when it keeps everything."""
    untouched = oracle.run(model, inputs, **kwargs)
    with foveate.prune(model, method):
        return float((oracle.run(model, inputs, **kwargs).logits - untouched.logits).abs().max())


def contrasted(family: str, batch: str, attn: str, decoding: str) -> Pair:
    """MINT."""
    inputs, everything = tiny.inputs(family, **tiny.BATCHES[batch]), foveate.MINT(keep=1.0)
    at_one = keeping_all(tiny.build(family, attn), everything, inputs, oracle.DECODING[decoding])
    return test_contrast.check(family, inputs, attn, **test_contrast.DECODING[decoding]), at_one


def grouped(family: str, batch: str, attn: str, decoding: str) -> Pair:
    """VisToG, whose keep is a number of groups."""
    method = test_vistog.trained(family)
    return test_vistog.check(family, method, tiny.BATCHES[batch], attn, oracle.DECODING[decoding]), None


def compressed(family: str, batch: str, attn: str, decoding: str) -> Pair:
    """QueCC, whose keep is a number of tokens of its own."""
    method, inputs = test_quecc.written(Path(FOLDER.name), family, 4), tiny.inputs(family, **tiny.BATCHES[batch])
    return test_quecc.check(method, family, inputs, attn, oracle.DECODING[decoding])[1], None


def routed(family: str, batch: str, attn: str, decoding: str) -> Pair:
    """VideoLLM-MoD, which weighs what goes through a layer at any keep."""
    spec, method = tiny.BATCHES[batch], test_depth.trained(family)
    return test_depth.check(family, method, tiny.inputs(family, **spec), spec, attn, **oracle.DECODING[decoding]), None


def merged_over_frames(name: str, batch: str, attn: str, decoding: str) -> Pair:
    """FastVID and HoliTom, which merge."""
    spec = {"videos": (1,), **VIDEOS[batch]}
    return test_merging_video.check_videos(name, spec, attn, oracle.DECODING[decoding]), None


def rows() -> Iterator[tuple[str, str, dict[str, Any], Case]]:
    """Family, method, its options, and how a case of it is compared."""
    for family, name in FITS:
        method, options = METHODS[name]
        yield family, method, options, partial(dropping, family, method, options)
    for name, options in DROPPING.items():
        for family in ON_VIDEO if name in test_video.ACROSS else tiny.CORE_DECODERS:
            yield family, name, options, partial(dropping, family, name, options)
    for family in tiny.CORE_DECODERS:
        yield family, "mint", test_contrast.MINT, partial(contrasted, family)
        yield family, "videollm_mod", {"keep": 0.25, "layers": (1, 3)}, partial(routed, family)
    for family in ("llava", "llava_next"):
        yield family, "vistog", {"keep": 5}, partial(grouped, family)
    yield "llava", "quecc", {"keep": 4}, partial(compressed, "llava")
    for name, (_, options) in test_merging_video.METHODS.items():
        yield "qwen2_5_vl", name, options, partial(merged_over_frames, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of results")
    torch.set_num_threads(1)
    matrix = list(rows())
    assert {name for _, name, _, _ in matrix} == set(foveate.methods()), "every method is proven"
    settings = {"models": "tiny, random", "dtype": "float32", "device": "cpu", "threads": 1, "seed": 0}
    with Results(parser.parse_args().out, "proof", settings, keys=("method", "options", "family")) as results:
        for family, name, options, case in track(matrix, description="methods x families"):
            named = {"method": name, "options": ", ".join(f"{k}={v}" for k, v in options.items()), "family": family}
            if results.find(**named):
                continue
            cases = [case(*at) for at in product(tiny.BATCHES, ("eager", "sdpa"), oracle.DECODING)]
            found = torch.tensor([largest for largest, _ in cases], dtype=torch.float64)
            row: dict[str, Any] = named | {"place": foveate.method_class(name).place, "cases": len(cases)}
            row["steps"] = test_contrast.STEPS if name == "mint" else oracle.STEPS
            row["largest_difference"] = float(found.amax())  # no number counts as the largest
            all_kept = [at_one for _, at_one in cases if at_one is not None]
            row["at_keep_1"] = max(all_kept) if all_kept else None
            results.add(row)
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
