"""QueCC: a trained compressor that reads the question and makes one token of each cell of the picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import register
from .base import EncoderMethod
from .budgets import check_choice
from .host import Host
from .pooling import bands, cells
from .tokens import EncoderTokens
from .trained import TrainedMethod

Weights = Mapping[str, Tensor]
HEADS = 8
SIDE = 24  # of the grid that a kernel is made for where pictures keep their shapes


def place_within(part: Tensor) -> Tensor:
    """How far into its part the middle of each place lies, in (0, 1). part: (..., places), the same number for all
    places of one part."""
    same = part.unsqueeze(-1) == part.unsqueeze(-2)
    return (same.tril(-1).sum(-1) + 0.5) / same.sum(-1)


def cut(budget: Tensor, grid: tuple[int, int], most: int) -> tuple[Tensor, Tensor]:
    """Cut each tile into `budget` cells, as `pooling` does.

    budget: (tiles,), each at most `most`. Returns bool (tiles, most, n), the patches of each cell, none where a tile
    has fewer cells; and (tiles, n, 2) where each patch lies in its cell, (down, right) in (0, 1).
    """
    band, run, _ = cells(budget, grid)
    # As many cells as budgets ask for lie in front of a band.
    cell = (band * budget.unsqueeze(-1) // (band[:, -1:] + 1)).unsqueeze(-1) + run
    right = place_within(run)
    down = place_within(band).unsqueeze(-1).expand_as(right)
    member = cell.flatten(1).unsqueeze(1) == torch.arange(most, device=budget.device).unsqueeze(-1)
    return member, torch.stack([down, right], -1).flatten(1, 2)


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    """A linear layer: (..., in) -> (..., out)."""
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def mlp(x: Tensor, weights: Weights, name: str) -> Tensor:
    """Two linear layers around a GELU."""
    return linear(F.gelu(linear(x, weights, f"{name}.0")), weights, f"{name}.1")


def norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    """A layer norm over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"], 1e-6)


def queries(states: Tensor, question: Tensor | None, member: Tensor, place: Tensor, weights: Weights) -> Tensor:
    """One query a cell: patches and question, through a depthwise convolution whose kernel covers the cell.

    Cells of another size than the kernel's read it stretched: each patch the weight at its place, their sum as large as
    that of a whole kernel. states: (tiles, n, width). question: (tiles, hidden), or None for no part of it. member,
    place: as `cut` returns them. Returns (tiles, cells, width).
    """
    if question is not None:
        states = states + norm(linear(question, weights, "text"), weights, "text").unsqueeze(1)
    patches = norm(mlp(states, weights, "query"), weights, "query")
    kernel = weights["cell.weight"].permute(1, 2, 0)  # (rows, columns, width)
    down, right = ((place[..., i] * kernel.shape[i]).long() for i in (0, 1))
    weighted = patches * kernel[down, right]
    share = member * (kernel[..., 0].numel() / member.sum(-1, keepdim=True).clamp(min=1))
    return share.to(weighted.dtype) @ weighted + weights["cell.bias"]


def heads_of(x: Tensor, weights: Weights, part: int) -> Tensor:
    """Queries (part 0), keys (1) or values (2) of each head: (tiles, n, width) -> (tiles, heads, n, d)."""
    weight, bias = weights["attend.in.weight"][part], weights["attend.in.bias"][part]  # (heads, d, width), (heads, d)
    return F.linear(x, weight.flatten(0, 1), bias.flatten()).unflatten(-1, bias.shape).transpose(1, 2)


def keys_and_values(levels: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """What cells read, of patches behind several encoder layers (tiles, n, levels, width): two (tiles, heads, n, d)."""
    joined = levels.flatten(2)
    keys, values = (norm(mlp(joined, weights, name), weights, name) for name in ("key", "value"))
    return heads_of(keys, weights, 1), heads_of(values, weights, 2)


def attend(query: Tensor, keys: Tensor, values: Tensor, member: Tensor, weights: Weights) -> Tensor:
    """Multi-head attention of each cell's query on the cell's own patches.

    query: (tiles, cells, width). keys, values: (tiles, heads, n, d). member: bool (tiles, cells, n). Returns
    (tiles, cells, width); what stands for a cell without patches has no meaning.
    """
    seen = member | ~member.any(-1, keepdim=True)
    mixed = F.scaled_dot_product_attention(heads_of(query, weights, 0), keys, values, seen.unsqueeze(1))
    return linear(mixed.transpose(1, 2).flatten(2), weights, "attend.out")


@register("quecc")
@dataclass
class QueCC(TrainedMethod, EncoderMethod):
    """Make one token of each cell of the picture: what a query, made of the cell and the question, reads in it.

    The picture is cut into as many even cells as tokens stay, as `pooling` cuts it, and each token stands amid its
    cell. Tiled models: every tile is cut with its share of the image's tokens.

    keep: int, tokens per image, as in training. For glimpse there are weights for 16, 9, 4 and 1.
    weights: a file of weights, or a folder with one; None for those that come with the library, for glimpse.
    question: "own", or "none" for a compressor that was trained without it.

    Source: Li et al., arXiv 2411.03312, locuslab/llava-token-compression. Queries, keys and values, the kernel and the
    layers of the encoder (12, 16, 22 and 23 of 24) follow the authors' code, and so does the question: the LLM's last
    state at the end of the text alone. There that is the user's first words, here all text of the prompt; cells of
    another size than in training, and several images, which the code refuses, are this library's.
    """

    summary = "trained: each cell of the picture becomes a token that the question chose, before the LLM"
    source = "arXiv 2411.03312, locuslab/llava-token-compression"
    fixed = ("keep", "question")

    keep: float | int = 16
    question: Literal["own", "none"] = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.keep, int):
            raise ValueError(
                f"keep must be the tokens per image that the weights were trained for, an int, got {self.keep!r}"
            )
        check_choice("question", self.question, ("own", "none"))

    def initial(self, host: Host) -> dict[str, Tensor]:
        assert host.encoder is not None  # the engine took the model
        depth, seen, side = host.encoder.depth, host.encoder.width, host.encoder.side or SIDE
        projector = host.projector()
        width = projector["linear_1.weight"].shape[1] if projector else host.hidden  # where the encoder joins patches
        rows = int(bands(torch.tensor([self.keep]).clamp(max=side**2), (side, side)))
        cell = max(1, round(side / rows)), max(1, round(side * rows / self.keep))
        read, heads = seen * len(self.levels(depth)), math.gcd(HEADS, width)
        shapes = {"text": (width, host.hidden), "attend.in": (3, heads, width // heads, width)}
        shapes |= {"attend.out": (width, width), "project.0": (host.hidden, width), "project.1": (host.hidden,) * 2}
        for name, inputs, inner in (("query", width, width // 2), ("key", read, width // 4), ("value", read, width)):
            shapes |= {f"{name}.0": (inner, inputs), f"{name}.1": (width, inner)}
        weights = {f"{name}.weight": torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}
        weights |= {f"{name}.bias": torch.zeros(shape[:-1]) for name, shape in shapes.items()}
        weights |= {"cell.weight": torch.full((width, *cell), 1 / math.prod(cell)), "cell.bias": torch.zeros(width)}
        for name in ("text", "query", "key", "value"):
            weights |= {f"{name}.norm.weight": torch.ones(width), f"{name}.norm.bias": torch.zeros(width)}
        # What is read begins as the patches that the projector knows.
        last = torch.eye(width, seen) if seen == width else weights["value.0.weight"][:, -seen:]
        weights["value.0.weight"] = torch.cat([torch.zeros(width, read - seen), 0.3 * last], 1)
        weights["attend.in.weight"][2] = torch.eye(width).unflatten(0, (heads, -1))
        weights["value.1.weight"], weights["attend.out.weight"] = torch.eye(width), torch.eye(width)
        for i in (0, 1) if projector else ():
            weights |= {f"project.{i}.{kind}": projector[f"linear_{i + 1}.{kind}"] for kind in ("weight", "bias")}
        return {name: tensor.to(host.device) for name, tensor in weights.items()}

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"states", "levels", "question"} if self.question == "own" else {"states", "levels"})

    def levels(self, depth: int) -> tuple[int, ...]:
        # As deep as the authors' of 23 (12, 16, 22, 23), each once.
        scaled = (round(12 / 23 * depth), round(16 / 23 * depth), depth - 1, depth)
        return tuple(sorted({max(1, layer) for layer in scaled}))

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        *_, amid = cells(budget, tokens.grid)
        return amid.flatten(1)

    def merge(self, tokens: EncoderTokens, keep: Tensor) -> Tensor | None:
        assert tokens.states is not None and tokens.levels is not None
        question = None if tokens.question is None else tokens.question.float()
        member, place = cut(keep.sum(-1), tokens.grid, tokens.most or keep.shape[-1])
        weights = {name: weight.to(tokens.device) for name, weight in self.tensors.items()}
        query = queries(tokens.states.float(), question, member, place, weights)
        read = attend(query, *keys_and_values(tokens.levels.float(), weights), member, weights)
        made = mlp(read, weights, "project")
        cell = member.to(torch.uint8).argmax(1)
        return made.gather(1, cell.unsqueeze(-1).expand(-1, -1, made.shape[-1]))
