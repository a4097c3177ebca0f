"""Everything that a method must hold on one family."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from foveate.engine.session import prune
from foveate.errors import UnsupportedError
from foveate.evaluation.proving import cannot_prove, generate, prove
from foveate.methods.base import CacheMethod, DepthMethod, Method

from .answers import watched
from .merging import can_imitate, difference
from .subjects import Subject
from .summary import Line

STEPS = 6  # of decoding, behind the prefill
TOLERANCE = 1e-4  # of the largest logit, in float32; a single wrong key costs a hundred times as much


def examine(method: Method, subject: Subject) -> Line:
    """Check a method on all prompts and implementations of attention.

    Raises:
        UnsupportedError: where the method does not fit the family.
        AssertionError: for what does not hold.
    """
    worst, report = None, None
    alone = cannot_prove([method]) is not None and not can_imitate(method)
    for attn in subject.backends:
        model = subject.build(attn)
        prune(model, method).remove()  # refuses what does not fit, before anything is compared
        for prompt, inputs in subject.prompts.items():
            with _sentence(f"{method.name} on {subject.family} ({prompt}, {attn} attention)"):
                with _left_as_it_was(model, inputs) as untouched:
                    _keeps_all(method, model, inputs, untouched)
                    off, found = _compare(method, model, inputs, subject.rounding, alone)
                    _same_again(method, model, inputs, found)
                _budget(method, found)
                report = report or found
                worst = off if worst is None or (off is not None and off > worst) else worst
    assert report is not None
    tokens, kept = report.images[0][0]
    note = "not compared, since it does more than drop tokens and no reference can imitate it" if alone else ""
    return Line(method.name, subject.family, tokens, kept, worst, note)


@contextmanager
def _sentence(where: str) -> Iterator[None]:
    """Say of whatever goes wrong where it did."""
    try:
        yield
    except UnsupportedError:
        raise
    except AssertionError as error:
        raise AssertionError(f"{where}: {error or 'an assertion of its own fails'}") from error
    except Exception as error:
        raise AssertionError(f"{where}: it raises {type(error).__name__}: {error}") from error


@contextmanager
def _left_as_it_was(model: Any, inputs: dict[str, Any]) -> Iterator[Tensor]:
    """Whether the model, unpruned again, has its weights, its hooks and its logits, which are yielded."""
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    answer = generate(model, inputs, STEPS)[1]
    hooks = _hooks(model)  # behind a first run, in which transformers puts up some of its own
    yield answer
    changed = [name for name, weight in model.state_dict().items() if not torch.equal(weight, weights[name])]
    assert not changed, f"the model is not what it was: {changed[0]} has other values"
    assert _hooks(model) == hooks, "the model is not what it was: hooks stay behind"
    assert torch.equal(generate(model, inputs, STEPS)[1], answer), "the model is not what it was: its logits differ"


def _hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.inference_mode()
def _keeps_all(method: Method, model: Any, inputs: dict[str, Any], untouched: Tensor) -> None:
    with prune(model, dataclasses.replace(method, keep=1.0)):
        logits = generate(model, inputs, STEPS)[1]
    off = float((logits - untouched).abs().max())
    assert torch.equal(logits, untouched), f"with keep=1.0 the logits differ from the untouched model's by {off:.1e}"


def _compare(
    method: Method, model: Any, inputs: dict[str, Any], rounding: float, alone: bool
) -> tuple[float | None, Any]:
    """How far the logits are from the reference's, and the report. alone: nothing can imitate the method."""
    with watched(method):
        if alone:
            with torch.inference_mode(), prune(model, method, record=True) as pruned:
                generate(model, inputs, STEPS)
            return None, pruned.report
        if cannot_prove([method]):
            with torch.inference_mode():
                off, scale, report = difference(model, inputs, method, STEPS)
            blind = False
        else:
            proof = prove(model, inputs, [method], steps=STEPS)
            off, scale, report = proof.difference, proof.scale, proof.report
            blind = max(step.unhidden for step in proof.steps) <= TOLERANCE * rounding * scale
            assert not proof.faults, f"the KV cache is not what the report says: {'; '.join(proof.faults)}"
    allowed = TOLERANCE * rounding * scale
    assert off <= allowed, f"the logits differ from the reference's by {off:.1e}, where {allowed:.1e} is rounding"
    assert not blind or method.keeps_all, "nothing that matters was dropped, so nothing was proven: use a smaller keep"
    return off, report


@torch.inference_mode()
def _same_again(method: Method, model: Any, inputs: dict[str, Any], before: Any) -> None:
    with prune(model, method, record=True) as pruned:
        generate(model, inputs, STEPS)
    assert pruned.report is not None
    for old, new in zip(before.layers, pruned.report.layers, strict=True):
        same = old.kept is not None and new.kept is not None and torch.equal(old.kept, new.kept)
        assert same, f"a second run of the same prompt keeps other tokens in layer {old.index}: seed what is random"


def _budget(method: Method, report: Any) -> None:
    """What the layers together hold of each image: at most what `keep` asks for, and something."""
    if method.place not in ("encoder", "layer", "depth", "cache"):
        return
    layers = [layer for layer in report.layers if layer.kept_length < layer.length]
    if isinstance(method, CacheMethod):
        # What a window left behind counts as kept, and a state has no entries to lose.
        held = [layer for layer in report.layers[method.first_layer() :] if layer.kind == "self"]
        layers = [layer for layer in held if not layer.sliding]
    elif not isinstance(method, DepthMethod):
        layers = report.layers[-1:]  # behind the last stage
    for sample, images in enumerate(report.image_tokens if layers else []):
        for image in images:
            at, total = image.positions, len(image.positions)
            structure = total - sum(len(tile.index) for tile in image.tiles)
            kept = torch.stack([layer.kept[sample][:, at].sum(-1).max() for layer in layers]).float()
            asked = method.keep if isinstance(method.keep, int) else method.keep * total
            most = max(asked, structure + sum(tile.grid[1] for tile in image.tiles) if asked < structure else 1)
            mean = float(kept.mean())
            assert kept.min() >= 1, "nothing of an image stays, of which something must always stay"
            assert mean <= most + 0.51, f"{mean:.0f} of {total} tokens of an image stay, where keep asks for {most:.0f}"
