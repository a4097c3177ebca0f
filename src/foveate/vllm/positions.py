"""Where tokens stand in the unpruned prompt, and how the worker learns it. Plain tensors; needs no vLLM.

vLLM asks for the positions of a prompt before its pictures are encoded, and lets the model mend them once they are
(`recompute_mrope_positions`). What was chosen travels from the encoder to there as further columns of the embeddings.
A table of positions is (3, prompt) int64. Under M-RoPE these are time, row and column, and the time of a picture's
tokens, which all share it, is that where the picture begins. Elsewhere the language model reads the first row alone:
there the second says where the picture of a token begins, and the third, everywhere, how long the unpruned prompt is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import Plan

BASE = 128  # every dtype holds the digits exactly: bfloat16 has whole numbers up to 256
DIGITS = 3


def columns_of(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers below BASE ** DIGITS as exact columns. int64 (n, k) -> (n, k * DIGITS)."""
    powers = BASE ** torch.arange(DIGITS - 1, -1, -1, device=numbers.device)
    return (numbers.unsqueeze(-1) // powers % BASE).flatten(1).to(dtype)


def numbers_of(columns: Tensor) -> Tensor:
    """What `columns_of` wrote: (n, k * DIGITS) -> int64 (n, k)."""
    powers = BASE ** torch.arange(DIGITS - 1, -1, -1, device=columns.device)
    return (columns.unflatten(1, (-1, DIGITS)).long() * powers).sum(-1)


def width(m_rope: bool) -> int:
    """How many columns follow an embedding."""
    return DIGITS * (2 if m_rope else 1)


class Placed(NamedTuple):
    """A picture or film in a prompt: where its placeholders stand, and its plan; None where it is not pruned."""

    offset: int
    length: int
    plan: Plan | None


class Unpruned(NamedTuple):
    """The prompt without pruning.

    tokens: its ids. columns: (prompt,) where each token of the pruned prompt stands in it. starts, lengths: of the
    pictures and films in it.
    """

    tokens: list[int]
    columns: Tensor
    starts: list[int]
    lengths: list[int]


def unpruned(tokens: Sequence[int], items: Sequence[Placed]) -> Unpruned:
    """Undo the pruning of a prompt. items: in the order in which they stand there."""
    full: list[int] = []
    columns: list[Tensor] = []
    starts, lengths, done = [], [], 0

    def through(end: int) -> None:
        columns.append(torch.arange(len(full), len(full) + end - done))
        full.extend(tokens[done:end])

    for offset, length, plan in items:
        through(offset)
        done = offset
        starts.append(len(full))
        if plan is None:
            through(offset + length)
        else:
            columns.append(len(full) + plan.remaining)
            full.extend(plan.full.tolist())
        lengths.append(len(full) - starts[-1])
        done = offset + length
    through(len(tokens))
    return Unpruned(full, torch.cat(columns), starts, lengths)


def guessed(prompt: Unpruned, items: Sequence[Placed], full: Tensor | None) -> Tensor:
    """The table of a pruned prompt before its pictures are encoded; those of image tokens are a guess.

    full: (3, unpruned prompt) the model's own positions under M-RoPE, None elsewhere.
    """
    if full is not None:
        return full[:, prompt.columns]
    table = torch.stack([prompt.columns, prompt.columns, torch.full_like(prompt.columns, len(prompt.tokens))])
    for item, start in zip(items, prompt.starts, strict=True):
        table[1, item.offset : item.offset + item.length] = start
    return table


def check_offsets(prompt: Unpruned, items: Sequence[Placed], full: Tensor) -> None:
    """Raise ValueError where a model's M-RoPE lays out pictures in another way than `Plan.offsets` says."""
    for item, start in zip(items, prompt.starts, strict=True):
        if item.plan is not None:
            own = full[:, start + item.plan.embeds.nonzero()[:, 0]]
            begins = own[0, 0]
            cells = item.plan.offsets(torch.arange(item.plan.layout.tokens), True)
            if (own[0] != begins).any() or (own[1:] - begins != cells).any():
                raise ValueError(
                    "the positions of this model's image tokens are not known to foveate: use transformers"
                )


def mended(
    table: Tensor, media: Tensor, computed: int, embeddings: Sequence[Tensor], hidden: int, m_rope: bool
) -> tuple[list[Tensor], Tensor, int]:
    """Put the positions of the tokens that stay into a table. Doing it twice changes nothing more.

    table: (3, prompt). media: bool (prompt,), where pictures and films go. computed: tokens of the prompt that earlier
    steps have computed. embeddings: (n, width) of this step's pictures and films, in order, with columns behind them
    where their width is no multiple of `hidden`.

    Returns the embeddings without these, the table, and what is to be added to a token's place in the pruned prompt
    to get its position, for those behind the prompt.
    """
    table, rows = table.clone(), []
    places = media.nonzero()[:, 0]
    places = places[places >= computed]
    for embedding in embeddings:
        here, places = places[: len(embedding)], places[len(embedding) :]
        if embedding.shape[1] % hidden:
            offsets = numbers_of(embedding[:, -width(m_rope) :].to(table.device)).T
            first, begins = (1, table[0, here]) if m_rope else (0, table[1, here])
            table[first : first + len(offsets), here] = begins + offsets
            embedding = embedding[:, : -width(m_rope)]
        rows.append(embedding)
    behind = int(table[:, -1].max()) + 1 if m_rope else int(table[2, -1])
    return rows, table, behind - table.shape[1]
