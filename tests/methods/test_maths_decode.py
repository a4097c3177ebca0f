"""The maths of the methods that choose for every decoding step, against slow, obvious re-implementations."""

from __future__ import annotations

import math

import pytest
import torch
from slow import slow_topk
from torch import nn

from foveate.methods.attention_predictor import (
    SHAPES,
    AttentionPredictor,
    blocks_of,
    pooled,
    predicted,
    pushed,
    said,
    said_behind,
)
from foveate.methods.budgets import first_largest
from foveate.methods.step_baselines import LastStep, Pages, RunningSum, page_bounds

CELLS = {
    # tile, row, column of each token: a 3 x 5 picture, and a 2 x 2 tile beside a 1 x 3 one
    "picture": [(0, row, column) for row in range(3) for column in range(5)],
    "tiles": [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 0, 2)],
}


def slow_blocks(cells: list[tuple[int, int, int]], block) -> list[int]:
    if isinstance(block, int):
        return [i // block for i in range(len(cells))]
    names = [(tile, row // block[0], column // block[1]) for tile, row, column in cells]
    return [sorted(set(names)).index(name) for name in names]


@pytest.mark.parametrize("block", [1, 4, (1, 1), (2, 2), (2, 3), (9, 9)])
@pytest.mark.parametrize("padding", ["in front", "behind"])
def test_blocks(block, padding):
    width = max(map(len, CELLS.values())) + 2
    cells, present, expected = torch.zeros(2, width, 3, dtype=torch.long), torch.zeros(2, width, dtype=torch.bool), []
    for row, own in enumerate(CELLS.values()):
        start = width - len(own) if padding == "in front" else 0
        cells[row, start : start + len(own)] = torch.tensor(own)
        present[row, start : start + len(own)] = True
        expected.append(slow_blocks(own, block))
    found = blocks_of(cells, present, block)
    assert [row[there].tolist() for row, there in zip(found, present, strict=True)] == expected
    assert (found[~present] >= 0).all()


def test_the_largest_and_of_equals_the_first():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([-math.inf, -2.5, -1e-30, -0.0, 0.0, 1e-30, 0.25, 1.0, 3e38, math.inf])
    for scores in (
        torch.randn(3, 50, generator=generator),
        values[torch.randint(len(values), (3, 50), generator=generator)],
        torch.randint(-3, 3, (3, 50), generator=generator).bfloat16(),
    ):
        order = scores.argsort(dim=-1, descending=True, stable=True)
        for most in (1, 7, 50):
            assert torch.equal(first_largest(scores, most), order[..., :most])


def test_the_most_of_a_block_and_the_last_rows():
    attention = torch.tensor([[[0.1, 0.4, 0.2, 0.0, 0.3]]])
    block = torch.tensor([[0, 2, 2, 1, 0]])
    assert torch.equal(pooled(attention, block, 4), torch.tensor([[[0.3, 0.0, 0.4, 0.0]]]))
    history = torch.arange(6.0).view(3, 2)
    assert pushed(history, torch.tensor([[9.0, 9.0]])).tolist() == [[2, 3], [4, 5], [9, 9]]
    assert pushed(history, torch.ones(5, 2)).tolist() == [[1, 1]] * 3


def plain_network(weights: dict[str, torch.Tensor]) -> nn.Module:
    """The network of modules, as one would write it for one image."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.near, self.far = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
            self.mean, self.out = nn.AdaptiveAvgPool2d((1, None)), nn.Conv1d(32, 1, 1)

        def forward(self, x):
            x = self.far(self.near(x[None, None]).relu()).relu()
            return self.out(self.mean(x)[:, :, 0])[0, 0]

    network = Network()
    network.load_state_dict(weights)
    return network


@torch.no_grad()
def test_the_network_and_what_stands_behind_an_image():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    assert sum(tensor.numel() for tensor in weights.values()) == 4833
    history = torch.rand(3, 5, 7, generator=generator)
    real = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    found = predicted(history * real.unsqueeze(1), real, weights)
    for row, count in enumerate((7, 4, 1)):
        expected = plain_network(weights)(history[row, :, :count])
        assert (found[row, :count] - expected).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6, 9, 16])
def test_only_the_ends_of_the_history_say_something_new(steps):
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    real = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    history = torch.rand(3, steps, 7, generator=generator) * real.unsqueeze(1)
    say = said(history, real, weights)
    for _ in range(6):
        history = pushed(history, torch.rand(3, 1, 7, generator=generator) * real.unsqueeze(1))
        say = said_behind(say, history, real, weights)
        assert (say - said(history, real, weights)).abs().max() < 1e-4


def test_a_step_s_row_is_what_it_read():
    method = AttentionPredictor(history=2).holding({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    memory = {
        "block": torch.tensor([[0, 0, 1, 1]]),
        "real": torch.ones(1, 2, dtype=torch.bool),
        "history": torch.zeros(1, 1, 2, 2),
        "said": torch.zeros(1, 1, 2, 2),
    }
    for row in ([0.5, 0.1, 0.0, 0.0], [0.0, 0.0, 0.2, 0.3], [0.0, 0.4, 0.0, 0.0]):
        received = torch.tensor([[row]])
        memory = method.remember(memory, received, received > 0)
    assert torch.allclose(memory["history"], torch.tensor([[[[0.0, 0.3], [0.4, 0.0]]]]))


def test_what_was_not_read_stays_as_it_was_seen_last():
    memory = {"attention": torch.tensor([[[0.1, 0.2, 0.3]]])}
    received, attended = torch.tensor([[[0.0, 0.5, 0.0]]]), torch.tensor([[[True, True, False]]])
    assert torch.allclose(
        LastStep().remember(memory, received, attended)["attention"], torch.tensor([[[0.0, 0.5, 0.3]]])
    )
    assert torch.allclose(
        RunningSum().remember(memory, received, attended)["attention"], torch.tensor([[[0.1, 0.7, 0.3]]])
    )


@pytest.mark.parametrize("page", [1, 3, 4, 16])
def test_bounds_of_pages(page):
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(2, 2, 10, 3, generator=generator)
    present = torch.arange(10) < torch.tensor([10, 4])[:, None]
    low, high = page_bounds(keys, present, page)
    for group, count in enumerate((10, 4)):
        for number in range(low.shape[2]):
            own = keys[group, :, number * page : min((number + 1) * page, count)]
            if own.shape[1]:
                assert torch.equal(low[group, :, number], own.amin(1)) and torch.equal(
                    high[group, :, number], own.amax(1)
                )
            else:
                assert not low[group, :, number].any() and not high[group, :, number].any()


def test_a_page_counts_for_what_its_best_key_might():
    """No key's product exceeds its page's bound; the bound is the sum of the larger products, the most of the group."""
    generator = torch.Generator().manual_seed(2)
    keys, query = torch.randn(1, 2, 9, 4, generator=generator), torch.randn(1, 6, 4, generator=generator)
    low, high = page_bounds(keys, torch.ones(1, 9, dtype=torch.bool), 4)
    memory = {"low": low, "high": high, "page": torch.arange(9)[None] // 4}
    found = Pages(page=4).score(memory, query, 0.5)
    for head in range(2):
        for token in range(9):
            own = range(token // 4 * 4, min(token // 4 * 4 + 4, 9))
            bounds = []
            for q in range(3 * head, 3 * head + 3):
                total = 0.0
                for d in range(4):
                    products = [float(query[0, q, d] * keys[0, head, k, d]) for k in own]
                    total += max(max(products), min(products))
                bounds.append(total)
                assert max(float(query[0, q] @ keys[0, head, k]) for k in own) <= total + 1e-5
            assert math.isclose(float(found[0, head, token]), max(bounds), rel_tol=1e-5, abs_tol=1e-5)


def test_the_best_within_each_image_and_the_earlier_on_a_tie():
    from foveate.engine.memory import Memory
    from foveate.engine.reading import Part

    slots = torch.tensor([[[2, 3, 4, 5, -1], [7, 8, 9, 10, 11]]])
    memory = Memory(
        slots, torch.tensor([[2, 3]]), torch.tensor([[0, 1, 6]]), torch.zeros(1, 2, 5, 3).long(), {}, 12, 3, True
    )
    scores = torch.tensor([[[1.0, 2.0, 2.0, 2.0, 9.0]], [[0.0, 0.0, 3.0, 0.0, 0.0]]])
    scores = scores.masked_fill(slots[0].unsqueeze(1) < 0, -torch.inf)
    part = Part.made(LastStep().select(scores, 3), memory, 14)
    read = [slot for slot, there in zip(part.index[0, 0].tolist(), part.filled[0].tolist(), strict=True) if there]
    first, second = slow_topk([1, 2, 2, 2], 2), slow_topk([0, 0, 3, 0, 0], 3)
    expected = [2 + i for i, chosen in enumerate(first) if chosen] + [
        7 + i for i, chosen in enumerate(second) if chosen
    ]
    assert sorted(read) == sorted([0, 1, 6, 12, 13, *expected])
