"""Checking a family with methods of every place."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from foveate.errors import UnsupportedError
from foveate.families import get_family
from foveate.methods import get_method

from .examining import examine
from .features import check_features
from .subjects import Subject, of_model, of_tiny
from .summary import Line, Summary
from .tiny import known

# For each place: one that reads what the encoder pays attention to, one that reads features, and so on.
REPRESENTATIVES: dict[str, dict[str, Any]] = {
    "random": dict(keep=0.25),
    "divprune": dict(keep=0.25),
    "fopru": dict(keep=0.25),
    "fastv": dict(keep=0.5, layer=2),
    "csp": dict(keep=0.5),
    "plphp": dict(keep=0.5, start_layer=1),
    "pages": dict(keep=0.5, dense_layers=1),
    "random_cross": dict(keep=0.25),
    "trimmed_llama": dict(keep=0.1),
}


def check_family(model_type: str, config_or_model: PreTrainedConfig | PreTrainedModel | None = None) -> Summary:
    """Check a family with representative methods of each place that it offers, as `check_method` checks a method.

    config_or_model: a small configuration, which gets random weights, or a small model, whose own are used in float32;
    pictures are noise. By default the tiny model of that type (a subclass of `foveate.testing.tiny.base.Tiny`).

    Raises:
        AssertionError: with a sentence that names method, family and what differs; or where layouts and prompt differ,
            or what methods read of images and what the LLM sees.
        ValueError: for a type that is no family's, or has no tiny model.
    """
    family = get_family(model_type)
    if family is None:
        raise ValueError(f"no family {model_type!r}: docs/adding-a-family.md shows how to add one")
    if config_or_model is None:
        names = [name for name, tiny in known().items() if tiny.model_type == model_type and not tiny.variant]
        if not names:
            raise ValueError(f"no tiny model of {model_type!r}: pass a small configuration or model")
        subject = of_tiny(names[0])
    else:
        subject = of_model(config_or_model)
        assert subject.family == model_type, f"this is a {subject.family} model, not a {model_type} one"
    _layouts(subject)
    if "encoder" in family.places:
        check_features(subject)
    lines = []
    for name, options in REPRESENTATIVES.items():
        method = get_method(name, **options)
        try:
            lines.append(examine(method, subject))
        except UnsupportedError as error:
            lines.append(Line(name, subject.family, note=str(error)))
    refused = "; ".join(line.note for line in lines)
    assert any(line.tokens for line in lines), f"no method fits {model_type}: {refused}"
    return Summary(tuple(lines))


def _layouts(subject: Subject) -> None:
    """Whether tiles have the tokens of their grids, and no token lies outside its image or in two tiles."""
    config = subject.build(subject.backends[0]).config
    family = get_family(config)
    assert family is not None
    for inputs in subject.prompts.values():
        if "encoder" in family.places:
            images = [(layout.tokens, layout.tiles) for layout in family.layouts(config, inputs)]
        else:
            places = family.feature_places(config, inputs)
            images = [(len(index), tiles) for sample in places for index, tiles in sample]
        for number, (tokens, tiles) in enumerate(images):
            where = f"{family.model_type}: layout {number}"
            for tile in tiles:
                assert tile.grid[0] * tile.grid[1] == len(tile.index), (
                    f"{where}: a tile of {len(tile.index)} tokens has the grid {tile.grid}"
                )
            named = torch.cat([tile.index for tile in tiles])
            inside = (named >= 0) & (named < tokens)
            assert inside.all(), f"{where}: a tile names token {int(named[~inside][0])} of {tokens}"
            assert len(named.unique()) == len(named), f"{where}: two tiles name the same token"
