"""Layouts are known without a model, and one function says how many of their tokens stay."""

from __future__ import annotations

import pytest
import tiny
import torch
from cases import BEFORE_LLM, prune

import foveate
from foveate.layout import ImageLayout, Tile
from foveate.methods.selection import kept_tokens, tile_budgets


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
def test_a_configuration_is_enough_for_layouts(family):
    """What a server's front end asks: no weights, no modules."""
    batch = tiny.inputs(family, **tiny.BATCHES["ragged"])
    layouts = foveate.get_family(family).layouts(tiny.config(family), batch)
    counts = [n for row in tiny.image_counts(family, tiny.BATCHES["ragged"]["images"]) for n in row]
    assert [layout.tokens for layout in layouts] == counts
    for layout in layouts:
        assert layout.pinned == layout.tokens - sum(len(tile.index) for tile in layout.tiles)
        assert all(tile.frame == 0 for tile in layout.tiles)


@pytest.mark.parametrize("keep", [0.25, 0.5, 7])
@pytest.mark.parametrize("name", [name for name in BEFORE_LLM if name != "fopru_row"])
@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
@torch.no_grad()
def test_every_method_before_the_llm_keeps_as_many_as_the_layout_says(family, name, keep):
    batch, model = tiny.inputs(family, **tiny.BATCHES["ragged"]), tiny.build(family)
    with prune(model, name, keep=keep) as pruned:
        model(**batch)
    layouts = foveate.get_family(family).layouts(model.config, batch)
    kept = [kept for sample in pruned.report.images for _, kept in sample]
    assert kept == [kept_tokens(layout, keep) for layout in layouts]


def test_budgets_of_tiles_and_of_what_belongs_to_none():
    """12 tokens, 2 of them structure: half of them is 6, of which 4 are left for tiles of 8 and 2."""
    big, small = Tile(torch.arange(8), (2, 4), torch.arange(8)), Tile(torch.arange(10, 12), (1, 2), torch.arange(8, 10))
    layout = ImageLayout(12, (big, small))
    assert layout.pinned == 2 and layout.candidates.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]
    assert tile_budgets(layout, 0.5) == [3, 1] and kept_tokens(layout, 0.5) == 6
    assert kept_tokens(layout, 1.0) == 12 and kept_tokens(layout, 1) == 4, "every tile keeps one"
