"""Trains the network of attention_predictor on a frozen model: from the rows of its attention, the next one.

The model answers by rote. Of half the answers the histories are those of decoding: a row knows only the blocks that the
network, as it is by then, would have read.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import plugin
import torch
from lessons import FIRST_SEED
from torch import Tensor

from foveate.evaluation.questions import as_items
from foveate.evaluation.results import run_script
from foveate.glimpse import world
from foveate.methods.attention_predictor import AttentionPredictor, Memory, pooled, predicted, pushed
from foveate.methods.tokens import LayerTokens

KINDS = ("describe", "list", "line", "compare", "both", "each")  # those with long answers
SHARES = (0.1, 0.25, 0.5)  # of an image's blocks, that a step of the sparse histories reads
WINDOWS = 2048  # histories and next rows a step


@dataclass
class Answer:
    """What one layer did in an answer, by image.

    history: (groups, kv_heads, h, blocks) in front of it; rows: (groups, kv_heads, t, blocks) of its tokens; told:
    bool (groups, t), False behind its end; real: bool (groups, blocks).
    """

    history: Tensor
    rows: Tensor
    told: Tensor
    real: Tensor


class Taught(AttentionPredictor):
    """The method, and what it sees of the answers."""

    answers: list[Answer]

    def observe(self, tokens: LayerTokens, memory: Memory) -> Memory:
        """As the method does; the rows of an answer are kept whole."""
        if memory:
            rows = tokens.text
            attention = tokens.of_images(tokens.attention(rows)).clamp(min=0).unflatten(1, (tokens.key.shape[1], -1))
            found = pooled(attention.amax(2), memory["block"], memory["real"].shape[1])
            self.answers.append(Answer(memory["history"], found, rows[tokens.groups.row] >= 0, memory["real"]))
        return super().observe(tokens, memory)


def together(answers: Sequence[Answer]) -> Answer:
    """What all layers did, as if each had images of its own."""
    parts = [[getattr(answer, name) for answer in answers] for name in ("history", "rows", "told", "real")]
    return Answer(*map(torch.cat, parts))


def windows(answer: Answer, weights: dict[str, Tensor], refresh: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """All histories of an answer and the row that came next: (windows, h, blocks), (windows, blocks); and real blocks.

    Of every second image each row is known only where the network would have read.
    """
    history, (groups, heads, steps, _) = answer.history, answer.rows.shape
    sparse = torch.randperm(groups, device=history.device)[: groups // 2]
    share = torch.tensor(SHARES, device=history.device)[
        torch.randint(len(SHARES), (len(sparse),), device=history.device)
    ]
    budget = (share * answer.real[sparse].sum(-1)).ceil().view(-1, 1, 1)
    real = answer.real.unsqueeze(1).expand(-1, heads, -1)
    some = real[sparse]
    histories = []
    for step in range(steps):
        histories.append(history)
        row = answer.rows[:, :, step]
        if refresh is None or (step + 1) % refresh:
            coming = predicted(history[sparse].flatten(0, 1), some.flatten(0, 1), weights).view_as(some)
            rank = coming.masked_fill(~some, -torch.inf).argsort(-1, descending=True).argsort(-1)
            row = row.index_copy(0, sparse, row[sparse].masked_fill(rank >= budget, 0))
        history = pushed(history, row.unsqueeze(2))
    told = answer.told.unsqueeze(1).expand(-1, heads, -1)
    every = torch.stack(histories, 2)[told]
    return every, answer.rows[told], real.unsqueeze(2).expand(-1, -1, steps, -1)[told]


def recall(guess: Tensor, row: Tensor, real: Tensor, share: float = 0.25) -> Tensor:
    """How much of the rows' attention lies in the share of the blocks that are guessed to have most; one number."""
    budget = (share * real.sum(-1, keepdim=True)).ceil()
    rank = guess.masked_fill(~real, -torch.inf).argsort(-1, descending=True).argsort(-1)
    return (row * (rank < budget)).sum() / row.sum()


def lesson(model: Any) -> Callable[[Taught, plugin.Batch, int], dict[str, Tensor]]:
    """The loss of a batch: the squared error of the coming row, in units of an even row."""

    def loss(method: Taught, batch: plugin.Batch, step: int) -> dict[str, Tensor]:
        method.answers = []
        with torch.no_grad():
            model(**plugin.on_device(model, batch))
            history, row, real = windows(together(method.answers), method.tensors, method.refresh)
        some = torch.randperm(len(row), device=row.device)[:WINDOWS]
        history, row, real = history[some], row[some], real[some]
        guess = predicted(history, real, method.tensors)
        off = (guess - row) * real * real.sum(-1, keepdim=True)
        with torch.no_grad():
            seen = {"recall": recall(guess, row, real), "last_step": recall(history[:, -1], row, real)}
            seen["best"] = recall(row, row, real)
        return {"loss": off.square().sum() / real.sum(), **seen}

    return loss


def glimpse_batches(processor: Any, size: int) -> Callable[[int], Iterator[plugin.Batch]]:
    """Batches of questions with long answers about glimpse's pictures, from some step on; one kind a batch."""

    def batches(step: int) -> Iterator[plugin.Batch]:
        while True:
            kind = KINDS[step % len(KINDS)]
            asked = [world.question(FIRST_SEED + step * size + number, kind) for number in range(size)]
            yield plugin.encode(processor, as_items(asked))
            step += 1

    return batches


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = plugin.parser(__doc__ or "", steps=800, batch=8, rate=3e-3)
    parser.add_argument("--history", type=int, default=16, help="rows that the network sees")
    parser.add_argument("--block", type=int, nargs="+", default=[2, 2], help="rows and columns of a block, or tokens")
    return parser.parse_args(arguments)


def train(options: argparse.Namespace) -> list[dict[str, float]]:
    """Runs the steps that are left, and returns the log."""
    model, processor = plugin.load(options)
    block = tuple(options.block) if len(options.block) > 1 else options.block[0]
    method = Taught(history=options.history, block=block, dense_layers=0)
    talks = glimpse_batches(processor, options.batch)
    if options.data is not None:
        talks = plugin.Talks(processor, options.data, options.batch, options.seed)
    return plugin.train(options, model, method, talks, lesson(model))


if __name__ == "__main__":
    run_script(lambda: train(parse()))
