"""AttentionPredictor: a small network foretells which blocks of the image the next step will look at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from . import register
from .budgets import check_range
from .host import Host
from .stepwise import DecodeMethod, Memory
from .tokens import LayerTokens
from .trained import TrainedMethod

SHAPES = {
    "near.weight": (16, 1, 3, 3), "near.bias": (16,), "far.weight": (32, 16, 3, 3), "far.bias": (32,),
    "out.weight": (1, 32, 1), "out.bias": (1,),
}  # fmt: skip
"""The network's weights: 4,833 numbers."""


def blocks_of(cells: Tensor, present: Tensor, block: tuple[int, int] | int) -> Tensor:
    """Which block each token is in, counted through every image in reading order.

    cells: (groups, n, 3) tile, row and column of each token. present: bool (groups, n). block: rows and columns of a
    block, or so many tokens in a row of the image's own order. Returns int64 (groups, n), 0 at padding.
    """
    place = (present.cumsum(-1) - 1).clamp(min=0)
    if isinstance(block, int):
        return place // block
    rows, columns = block
    tile, down, across = cells[..., 0], cells[..., 1] // rows, cells[..., 2] // columns
    wide, high = across.max() + 1, down.max() + 1
    code = ((tile * high + down) * wide + across).masked_fill(~present, torch.iinfo(torch.int64).max)
    code, order = code.sort(dim=-1, stable=True)
    number = (code.diff(dim=-1, prepend=code[:, :1]) > 0).cumsum(-1)
    return torch.zeros_like(number).scatter(1, order, number).masked_fill(~present, 0)


def pooled(attention: Tensor, block: Tensor, blocks: int) -> Tensor:
    """The most that any token of a block gets. attention: (groups, ..., n), 0 at padding; block: (groups, n).

    Returns (groups, ..., blocks).
    """
    at = block.view(len(block), *[1] * (attention.ndim - 2), -1).expand_as(attention)
    return attention.new_zeros(*attention.shape[:-1], blocks).scatter_reduce(-1, at, attention, "amax")


def pushed(history: Tensor, rows: Tensor) -> Tensor:
    """The history with new rows at its end and as many of the oldest gone. (..., h, blocks), (..., r, blocks)."""
    return torch.cat([history, rows.to(history.dtype)], -2)[..., -history.shape[-2] :, :]


def _near(rows: Tensor, real: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The first convolution: (maps, r, blocks) -> (maps, 16, r, blocks)."""
    near = conv2d(rows.unsqueeze(1), weights["near.weight"], weights["near.bias"], padding=1).relu()
    return near * real[:, None, None].to(near.dtype)  # behind its last block an image ends as if it were alone


def _say(near: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The second one, and the sum over channels, of all rows but the first and last: (maps, r - 2, blocks)."""
    far = conv2d(near, weights["far.weight"], weights["far.bias"], padding=(0, 1)).relu()
    return conv2d(far, weights["out.weight"].unsqueeze(-1), weights["out.bias"])[:, 0]


def said(history: Tensor, real: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The network but for its mean over steps: what each row of the history says of the next one.

    history: (maps, h, blocks), the oldest row first. real: bool (maps, blocks), False behind an image's last block.
    weights: of the shapes in `SHAPES`. Returns (maps, h, blocks).
    """
    return _say(pad(_near(history, real, weights), (0, 0, 1, 1)), weights)


def predicted(history: Tensor, real: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The network: what the next row will be, by blocks. As `said` takes them; returns (maps, blocks)."""
    return said(history, real, weights).mean(1)


def said_behind(before: Tensor, history: Tensor, real: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """What all rows say once one was pushed at the end of the history: only those near its ends say something new.

    before: (maps, h, blocks) what they said of the history before. Returns the same of the history now.
    """
    if history.shape[1] < 6:
        return said(history, real, weights)
    # A row says what it does because of two rows on either side. Both ends run as one batch.
    near = _near(torch.cat([history[:, :5], history[:, -5:]]), real.repeat(2, 1), weights)
    first, last = near.chunk(2)
    ends = torch.cat([pad(first[:, :, :4], (0, 0, 1, 0)), pad(last[:, :, 1:], (0, 0, 0, 1))])
    oldest, newest = _say(ends, weights).chunk(2)
    return torch.cat([oldest, before[:, 4:-2], newest], 1)


@register("attention_predictor")
@dataclass
class AttentionPredictor(TrainedMethod, DecodeMethod):
    """Let each decoding step read those blocks of the image that a small network foretells from the steps before.

    The network (two 3 x 3 convolutions over steps and blocks, a mean over steps, 4,833 weights, one for all layers and
    heads) sees the last `history` rows of attention, the most that any token of a block got and any of the query heads
    that share a KV head. The prompt's last rows begin the history; every step appends its own row, which knows only
    what it read, but for every `refresh`-th, which reads everything. Nothing leaves the cache: reading is saved.

    keep: fraction of each image's tokens that a step reads, or tokens per image; 0.25 is this library's default.
    history: rows that the network sees; 16 is this library's default, since the prompts of a question are short; the
        authors' code has 64.
    block: rows and columns of a block of the picture, or tokens in a row as the authors' code has them (16 there);
        (2, 2) is this library's default: a picture has two dimensions.
    refresh: every so many steps everything is read; 5 is the authors' code's, where such a step's output is that of all
        tokens, too. None for never.
    dense_layers: layers at the bottom that always read everything; 2 is that of all the authors' runs.
    weights: of the network; None for those that come with the library, which are glimpse's.

    Source: AttentionPredictor, arXiv 2502.04077, and the authors' code (network, history, pooling, what is appended),
    which masks and saves nothing. There text is chosen among, too, and each query head chooses for itself.
    """

    summary = "a small network foretells which blocks of the image each decoding step reads; nothing is evicted"
    source = "AttentionPredictor, arXiv 2502.04077"

    keep: float | int = 0.25
    history: int = 16
    block: tuple[int, int] | int = (2, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("history", self.history, 1, integer=True)
        if isinstance(self.block, list):  # JSON knows no tuples
            self.block = tuple(self.block)
        sides = self.block if isinstance(self.block, tuple) else (self.block,)
        if len(sides) not in (1, 2):
            raise ValueError(f"block must be rows and columns, such as (2, 2), or tokens in a row, got {self.block!r}")
        for side in sides:
            check_range("block", side, 1, integer=True)

    def initial(self, host: Host) -> dict[str, Tensor]:
        fan = {name: math.prod(SHAPES[name.replace("bias", "weight")][1:]) for name in SHAPES}
        drawn = {name: torch.rand(shape, device=host.device) * 2 - 1 for name, shape in SHAPES.items()}
        return {name: tensor / fan[name] ** 0.5 for name, tensor in drawn.items()}

    def observe(self, tokens: LayerTokens, memory: Memory) -> Memory:
        groups = tokens.groups
        if not memory:
            assert groups.cells is not None
            block = blocks_of(groups.cells, groups.present, self.block)
            last = block.amax(-1, keepdim=True)
            real = torch.arange(int(last.max()) + 1, device=block.device) <= last
            shape = len(block), tokens.key.shape[1], self.history, real.shape[1]
            memory = {"block": block, "real": real, "history": tokens.key.new_zeros(shape)}
        rows = tokens.last_text(self.history)
        attention = tokens.of_images(tokens.attention(rows)).clamp(min=0)  # (groups, heads, rows, n)
        heads = attention.unflatten(1, (tokens.key.shape[1], -1)).amax(2)
        new = pooled(heads, memory["block"], memory["real"].shape[1])
        history = pushed(memory["history"], new)
        real = memory["real"].repeat_interleave(history.shape[1], 0)
        say = said(history.flatten(0, 1), real, self._weights(history))
        return {**memory, "history": history, "said": say.view_as(history)}

    def score(self, memory: Memory, query: Tensor, scaling: float) -> Tensor:
        coming = memory["said"].float().mean(2)
        return coming.gather(2, memory["block"].unsqueeze(1).expand(-1, coming.shape[1], -1))

    def remember(self, memory: Memory, received: Tensor, attended: Tensor) -> Memory:
        row = pooled(received, memory["block"], memory["real"].shape[1])
        history = pushed(memory["history"], row.unsqueeze(2))
        heads, real = history.shape[1], memory["real"]
        before = memory["said"].flatten(0, 1)
        real = real.repeat_interleave(heads, 0)
        now = said_behind(before, history.flatten(0, 1), real, self._weights(history))
        return {**memory, "history": history, "said": now.unflatten(0, (-1, heads))}

    def _weights(self, history: Tensor) -> dict[str, Tensor]:
        """The network in the precision of the model, which its history has."""
        return {name: weight.to(history) for name, weight in self.tensors.items()}
