"""Methods say whether the number of tokens that stay is known before the picture is: a server relies on it."""

import pytest
import torch

import foveate
from foveate.methods.base import EncoderMethod
from foveate.methods.tokens import ATTENTION, EncoderTokens

PLAIN = ATTENTION | {"features", "states"}


def plain_methods() -> list[EncoderMethod]:
    """Every method before the LLM that needs nothing but pictures, and each choice of words among its options."""
    named = [(name, {}) for name in foveate.methods()] + [("fopru", {"strategy": "row"})]
    classes = [(foveate.method_class(name), options) for name, options in named]
    made = [
        cls(keep=0.25, **options)
        for cls, options in classes
        if issubclass(cls, EncoderMethod) and isinstance(cls.__dataclass_fields__["keep"].default, float)
    ]
    return [method for method in made if method.reads <= PLAIN]


def spends(method: EncoderMethod, grid: tuple[int, int], budget: int) -> bool:
    """Whether two pictures of noise each keep exactly the budget."""
    rng = torch.Generator().manual_seed(7)
    n, layers = grid[0] * grid[1], method.vision_layers

    def noise(*shape: int) -> torch.Tensor:
        return torch.rand(2, *shape, generator=rng)

    read = {name: noise(layers, n) for name in ("received", "given", "cls")}
    features = noise(n, 16)
    tokens = EncoderTokens(
        grid, 2, torch.device("cpu"), **read, keys=noise(n, 8), features=features, states=features, most=budget
    )
    return method.select(tokens, torch.tensor([budget, budget])).sum(-1).tolist() == [budget, budget]


@pytest.mark.parametrize("method", plain_methods(), ids=lambda m: f"{m.name}-{getattr(m, 'strategy', '')}")
def test_said_and_done(method: EncoderMethod) -> None:
    grids = [(1, 1), (2, 3), (5, 7), (8, 8), (1, 9)]
    budgets = [(grid, max(1, grid[0] * grid[1] * part // 4)) for grid in grids for part in (1, 2, 4)]
    assert all(spends(method, *case) for case in budgets) == method.fills_budget


def test_some_do_not() -> None:
    assert {method.name for method in plain_methods() if not method.fills_budget} == {"fopru", "dycoke", "evs"}
