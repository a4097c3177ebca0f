"""The maths of `quecc` against plain modules of torch and a walk through the patches of each cell."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_quecc import PlainQueCC
from test_maths_encoder import slow_bands, slow_cells

from foveate.methods.quecc import QueCC
from foveate.methods.tokens import EncoderTokens

WIDTH, HIDDEN, LEVELS, HEADS = 16, 10, 3, 4


def bound(modules: PlainQueCC, keep: int, question: str = "own") -> QueCC:
    method = QueCC(keep=keep, question=question)
    method.__dict__["_tensors"] = modules.weights()
    return method


def shown(grid: tuple[int, int], tiles: int, most: int | None, question: bool = True, seed: int = 0) -> EncoderTokens:
    rng, n = torch.Generator().manual_seed(seed), math.prod(grid)
    return EncoderTokens(
        grid,
        tiles,
        torch.device("cpu"),
        states=torch.randn(tiles, n, WIDTH, generator=rng),
        levels=torch.randn(tiles, n, LEVELS, WIDTH, generator=rng),
        question=torch.randn(tiles, HIDDEN, generator=rng) if question else None,
        most=most,
    )


@pytest.mark.parametrize("question", ["own", "none"])
@pytest.mark.parametrize(
    ("keep", "grid", "cell"),
    [(16, (12, 12), (3, 3)), (9, (12, 12), (4, 4)), (4, (12, 12), (6, 6)), (1, (12, 12), (12, 12)), (8, (4, 8), (2, 2)),
     (36, (6, 6), (1, 1)), (36, (24, 24), (4, 4))],
)  # fmt: skip
def test_equal_cells_are_a_depthwise_convolution_and_an_attention_each(keep, grid, cell, question):
    modules = PlainQueCC(WIDTH, LEVELS * WIDTH, HIDDEN, HEADS, cell, seed=keep)
    tokens = shown(grid, 2, keep, question == "own")
    method = bound(modules, keep, question)
    chosen = method.select(tokens, torch.tensor([keep, keep]))
    becomes = method.merge(tokens, chosen)
    for tile in range(2):
        asked = tokens.question[tile] if question == "own" else None
        expected = modules(tokens.states[tile], tokens.levels[tile].flatten(1), asked, grid)
        torch.testing.assert_close(becomes[tile, chosen[tile]], expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4), st.data())
def test_cells_of_any_size_stretch_the_kernel(rows, columns, height, width, data):
    grid, budgets = (rows, columns), [data.draw(st.integers(1, rows * columns)) for _ in range(3)]
    modules = PlainQueCC(WIDTH, LEVELS * WIDTH, HIDDEN, HEADS, (height, width))
    tokens = shown(grid, 3, data.draw(st.sampled_from([max(budgets), None])), seed=sum(budgets))
    method = bound(modules, 1)
    chosen = method.select(tokens, torch.tensor(budgets))
    becomes = method.merge(tokens, chosen)
    for tile, budget in enumerate(budgets):
        cells = slow_cells(slow_bands(budget, grid), budget, grid)
        levels, question = tokens.levels[tile].flatten(1), tokens.question[tile]
        expected = modules.by_cell(tokens.states[tile], levels, question, cells, grid)
        assert chosen[tile].nonzero().flatten().tolist() == sorted(expected)
        for patch, token in expected.items():
            torch.testing.assert_close(becomes[tile, patch], token, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("depth", "levels"), [(23, (12, 16, 22, 23)), (5, (3, 4, 5)), (26, (14, 18, 25, 26)), (2, (1, 2)), (1, (1,))]
)
def test_levels_lie_as_deep_as_the_authors(depth, levels):
    assert QueCC().levels(depth) == levels


def test_a_compressor_without_the_question_does_not_ask_for_it():
    assert "question" in QueCC().reads and "question" not in QueCC(question="none").reads


@pytest.mark.parametrize("options", [dict(keep=0.5), dict(keep=1.0), dict(keep=0), dict(question="other")])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        QueCC(**options)
