"""What a family says of its images is so: found by gradient, and by what else is in a batch."""

from __future__ import annotations

import inspect

import oracle
import pytest
import tiny
import torch
from cases import METHODS, pruned_run
from torch import Tensor

from foveate.engine.images import by_image
from foveate.families import get_family

families = pytest.mark.parametrize("family", tiny.DECODER_FAMILIES)


def features(base, batch: dict, medium: str = "image") -> tuple[dict, object]:
    """What `get_image_features` (or that of videos) takes of the batch, and what it makes of it."""
    encode = getattr(base, f"get_{medium}_features")
    taken = inspect.signature(encode).parameters
    arguments = {name: value for name, value in batch.items() if name in taken}
    return arguments, encode(**arguments, return_dict=True)


def encoded(family: str, medium: str) -> tuple[list, Tensor, list[Tensor], int]:
    """The layouts of a batch, its features (tokens, hidden), and states of the encoder (pictures, n, width) behind the
    last attention that methods read, from where on patches mix no more; and how many of these n come before patches."""
    model = tiny.build(family, "eager", peak=0.5)  # so that no patch is looked past
    if medium == "image":
        batch = tiny.inputs(family, **tiny.BATCHES["ragged"])
    else:
        batch = tiny.videos(family, videos=(1, 2, 1), text=(4, 9, 2))
    known = get_family(model.config).seeing(medium)
    if not known.shows_attention:
        pytest.skip("an encoder whose attention is not read")
    base, seen = known.base(model), []
    readable = known.vision_attentions(base)

    def watch(module, args, kwargs, output):
        states = output if isinstance(output, Tensor) else output[0]
        states = states.detach().requires_grad_()
        seen.append(states)
        return states if isinstance(output, Tensor) else (states, *output[1:])

    inside = [module for layer in known.encoder_layers(base) for module in layer.modules()]
    alike = [module for module in inside if type(module) is type(readable[-1])]
    for later in alike[alike.index(readable[-1]) + 1 :]:
        for weight in later.parameters():
            weight.zero_()
    readable[-1].register_forward_hook(watch, with_kwargs=True)
    arguments, output = features(base, batch, medium)
    lay_out = known.layouts if medium == "image" else known.video_layouts
    layouts = lay_out(base.config, {**arguments, "input_ids": batch["input_ids"]})
    made = torch.cat(by_image(getattr(output, known.features), layouts, family))
    return layouts, made, seen, known.prefix_tokens(base.config)


LAYOUTS = [(name, "image") for name in (*tiny.DECODER_FAMILIES, *tiny.VARIANTS)]
LAYOUTS += [(name, "video") for name in tiny.VIDEO_FAMILIES]


@pytest.mark.parametrize(("family", "medium"), LAYOUTS)
@pytest.mark.sampled(3)
def test_a_token_is_made_of_exactly_the_patches_that_its_layout_names(family, medium):
    layouts, made, seen, prefix = encoded(family, medium)
    first = 0
    for layout in layouts:
        for tile in layout.tiles:
            for token, patches in zip(tile.index.tolist(), tile.patches.view(len(tile.index), -1), strict=True):
                slopes = torch.autograd.grad(made[first + token].sum(), seen, retain_graph=True, allow_unused=True)
                felt = [
                    (torch.zeros_like(states) if slope is None else slope).abs().sum(-1)
                    for states, slope in zip(seen, slopes, strict=True)
                ]
                felt = torch.cat([part.view(-1, part.shape[-1])[:, prefix:].flatten() for part in felt])
                assert felt.gt(1e-6 * felt.max()).nonzero()[:, 0].tolist() == patches.unique().tolist()
        first += layout.tokens


@families
@pytest.mark.parametrize("name", ["fopru_rank", "divprune", "plphp", pytest.param("fastv", marks=pytest.mark.slow)])
@pytest.mark.sampled(8)
def test_an_image_keeps_the_same_tokens_beside_an_image_of_another_kind(family, name):
    known, method = tiny.found[family], METHODS[name][0]
    if method in known.refused:
        pytest.skip("refused")
    one, other = (tiny.inputs(family, seed=seed) for seed in (0, 2))
    batch, model = known.beside(one, other), tiny.build(family)
    _, alone = pruned_run(model, name, one, max_new_tokens=2)
    _, beside = pruned_run(model, name, batch, max_new_tokens=2)
    padding = batch["input_ids"].shape[1] - one["input_ids"].shape[1]
    assert padding >= 3 and any((layer.kept_length < layer.length) for layer in alone.layers)
    for single, both in zip(alone.layers, beside.layers, strict=True):
        assert torch.equal(both.kept[:1, :, padding:], single.kept)
    untouched = oracle.run(model, one, max_new_tokens=2), oracle.run(model, batch, max_new_tokens=2)
    assert torch.allclose(untouched[0].logits, untouched[1].logits[:1], atol=1e-4)
