"""The reference of methods that merge: the untouched model, whose kept tokens become what the method made of them.

What the method says is taken as given; where it lands, what it is attended to by and for how long is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from foveate.engine.session import Pruned, prune
from foveate.evaluation.dense import eager, hidden
from foveate.evaluation.proving import generate
from foveate.methods.base import EncoderMethod, LayerMethod, Method

from .answers import Merges

# Where, in the prompts of a batch, what stands: sample, position, and the new state of each token.
Replaced = tuple[Tensor, Tensor, Tensor]


def can_imitate(method: Method) -> bool:
    """Whether there is a reference: the method merges before the LLM or inside it, and nothing else."""
    return isinstance(method, (EncoderMethod, LayerMethod)) and method.place != "logits"


def difference(model: Any, inputs: dict[str, Any], method: Method, steps: int) -> tuple[float, float, Any]:
    """The largest difference between logits of pruned model and reference, the largest logit, and the report."""
    merges = Merges()
    with merges.noted(method), prune(model, method, record=True) as pruned:
        sequences, logits, _ = generate(model, inputs, steps)
    report = pruned.report
    assert report is not None
    with eager(pruned.decoder), hidden(model, report), _replacing(pruned, method, report, merges):
        _, dense, _ = generate(model, inputs, steps, replay=sequences)
    return float((dense - logits).abs().max()), float(dense.abs().max()), report


@contextmanager
def _replacing(pruned: Pruned, method: Method, report: Any, merges: Merges) -> Iterator[None]:
    """Let the prompt's states be what the method made of them, where they enter the decoder or one of its layers."""
    layers = pruned.decoder.layers
    with ExitStack() as hooks:
        if isinstance(method, EncoderMethod):
            hook = partial(_write, _of_images(report, merges))
            hooks.enter_context(layers[0].register_forward_pre_hook(hook, with_kwargs=True))
        else:
            assert isinstance(method, LayerMethod)
            stages = method.stages(len(layers))
            for tokens, keep, becomes in merges.calls:
                sample = tokens.groups.row.unsqueeze(1).expand_as(keep)
                hook = partial(_write, [(sample[keep], tokens.groups.positions[keep], becomes[keep])])
                layer = layers[stages[tokens.stage]]
                hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield


def _of_images(report: Any, merges: Merges) -> list[Replaced]:
    """Where in the prompts the tokens of each tile stand: equally shaped ones were asked about together, in order."""
    tiles = [
        (sample, image.positions[tile.index.to(image.positions.device)], tile.grid)
        for sample, images in enumerate(report.image_tokens)
        for image in images
        for tile in image.tiles
    ]
    replaced = []
    for tokens, keep, becomes in merges.calls:
        mine = [tile for tile in tiles if tile[2] == tokens.grid][: len(keep)]
        tiles = [tile for tile in tiles if not any(tile is one for one in mine)]
        for (sample, positions, _), kept, values in zip(mine, keep, becomes, strict=True):
            at = positions[kept]
            replaced.append((at.new_full(at.shape, sample), at, values[kept]))
    return replaced


def _write(replaced: list[Replaced], module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    states = args[0] if args else kwargs["hidden_states"]
    if states.shape[1] == 1:  # a step, no prompt
        return None
    states = states.clone()
    for sample, position, becomes in replaced:
        states[sample, position] = becomes.to(states)
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})
