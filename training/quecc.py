"""Trains QueCC's compressor and its copy of the projector; the model stays as it is.

python training/quecc.py --keep 4 --out training/runs/quecc-4
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import plugin
import torch
import torch.nn.functional as F
from lessons import GRID, IGNORE, Lessons
from pupils import half_precision, normal
from torch import Tensor
from train import endless

import foveate
from foveate.evaluation.results import run_script
from foveate.methods.pooling import cells
from foveate.methods.quecc import QueCC, attend, cut, keys_and_values, mlp, queries
from foveate.methods.tokens import EncoderTokens
from foveate.methods.trained import TrainedMethod

Shown = tuple[Tensor, Tensor, Tensor]  # (patches, width), (patches, levels, width) and (questions, hidden)
LOOKS = 16  # batches that are seen before the first step
PARTS = 4  # into which the questions of a step are put, by length, so that little is padded


@dataclass(frozen=True)
class Pairs:
    """Questions, each beside the pictures it is about; `ids` and `labels` (pairs, n) are what stands behind these.

    example: (pairs,) whose pictures. length: (pairs,) of ids, before they are padded. end: (pairs,) where the prompt of
    the first turn ends, by which the pictures are compressed.
    """

    example: Tensor
    ids: Tensor
    labels: Tensor
    length: Tensor
    end: Tensor

    @classmethod
    def of(cls, batch: plugin.Batch, most: int) -> "Pairs":
        """Take lessons apart: at most so many of their questions, drawn by chance, long ones the more seldom."""
        ids, labels, turn = batch["ids"], batch["labels"], batch["turn"]
        of_turn = turn.unsqueeze(1) == torch.arange(1, int(turn.max()) + 1, device=turn.device).unsqueeze(-1)
        every = of_turn.any(-1).nonzero()
        lengths = of_turn.sum(-1)[every[:, 0], every[:, 1]]
        drawn = torch.multinomial(1 / lengths, min(most, len(every)))
        (example, number), length = every[drawn].unbind(-1), lengths[drawn]
        place = torch.arange(int(length.max()), device=turn.device)
        at = (of_turn.int().argmax(-1)[example, number].unsqueeze(-1) + place).clamp(max=ids.shape[1] - 1)
        ids, labels = (each[example.unsqueeze(-1), at] for each in (ids, labels))
        labels = labels.masked_fill(place >= length.unsqueeze(-1), IGNORE)
        return cls(example, ids, labels, length, (labels != IGNORE).int().argmax(-1) - 1)

    def alike(self, parts: int) -> "Iterator[tuple[Tensor, Pairs]]":
        """Which pairs, and they, in parts of similar length."""
        for rows in self.length.argsort().chunk(parts):
            longest = int(self.length[rows].max())
            some = (self.example[rows], self.ids[rows, :longest], self.labels[rows, :longest])
            yield rows, Pairs(*some, self.length[rows], self.end[rows])


class Glimpse:
    """glimpse and its lessons: pictures are seen once, and compressed anew for every question about them."""

    def __init__(self, model: Any, processor: Any, questions: int) -> None:
        self.lessons, self.questions = Lessons(processor), questions
        self.model, self.core = model, model.model
        self.prefix = torch.tensor(self.lessons.prefix()[:2], device=model.device)

    def batches(self, options: argparse.Namespace, step: int) -> Iterator[plugin.Batch]:
        settings = {"see_steps": 0, "steps": options.steps, "batch": options.batch, "workers": options.workers}
        return endless(self.lessons.processor, argparse.Namespace(**settings, size="glimpse"), step)

    @torch.no_grad()
    def shown(self, method: QueCC, batch: plugin.Batch) -> Shown:
        """What training begins with."""
        pairs = Pairs.of(batch, self.questions * batch["pixels"].shape[:2].numel())
        states, levels = self.seen(batch["pixels"].flatten(0, 1), method)
        return states.flatten(0, 1), levels.flatten(0, 1), self.asked(pairs)

    def loss(self, method: QueCC, batch: plugin.Batch) -> dict[str, Tensor]:
        """Cross-entropy of the answers, every question's as much as any other's, and the share that are right."""
        count = batch["pixels"].shape[1]
        pairs = Pairs.of(batch, self.questions * batch["pixels"].shape[:2].numel())
        with torch.no_grad():
            states, levels = self.seen(batch["pixels"].flatten(0, 1), method)
            with torch.autocast(pairs.ids.device.type, enabled=False):  # which would drown what is asked about
                asked = self.asked(pairs)
        of = (pairs.example.unsqueeze(-1) * count + torch.arange(count, device=asked.device)).flatten()
        made, at = tokens(method, states, levels, of, asked.repeat_interleave(count, 0))
        made = made.unflatten(0, (-1, count)).flatten(1, 2)
        place = (torch.arange(count, device=at.device).unsqueeze(-1) * GRID**2 + at).flatten()
        losses, right = [], []
        for rows, some in pairs.alike(PARTS):
            logits = self.logits(some.ids, made[rows], len(self.prefix) + place, count * GRID**2)
            target = some.labels[:, 1:]
            told = target != IGNORE
            lost = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=IGNORE, reduction="none")
            losses.append(lost.sum(1) / told.sum(1))
            right.append(((logits.argmax(-1) == target) | ~told).all(1).float())
        return {"loss": torch.cat(losses).mean(), "right": torch.cat(right).mean()}

    def asked(self, pairs: Pairs) -> Tensor:
        """(pairs, hidden) what the LLM makes of each question's text alone."""
        asked = torch.empty(len(pairs.ids), self.core.get_input_embeddings().embedding_dim, device=pairs.ids.device)
        for rows, some in pairs.alike(PARTS):
            prompts = some.ids[:, : int(some.end.max()) + 1]
            text = torch.cat([self.prefix.expand(len(rows), -1), prompts], 1)
            hidden = self.core.language_model(input_ids=text, use_cache=False).last_hidden_state
            asked[rows] = hidden[torch.arange(len(rows)), len(self.prefix) + some.end].float()
        return asked

    def seen(self, pixels: Tensor, method: QueCC) -> tuple[Tensor, Tensor]:
        """(pictures, n, width) what the projector gets, and (pictures, n, levels, width)."""
        states = self.core.vision_tower(normal(pixels), output_hidden_states=True).hidden_states[:-1]
        levels = [states[level][:, 1:] for level in method.levels(len(states) - 1)]
        return states[-1][:, 1:].float(), torch.stack(levels, 2).float()

    def logits(self, ids: Tensor, images: Tensor, place: Tensor, whole: int) -> Tensor:
        """(pairs, n - 1, vocabulary) behind each of `ids` (pairs, n) but the last.

        images: (pairs, kept, hidden). place: (kept,) their positions. whole: how many positions the pictures take.
        """
        embed, head = self.core.get_input_embeddings(), len(self.prefix)
        front, behind = embed(self.prefix).expand(len(ids), -1, -1), embed(ids[:, :-1])
        order = torch.arange(head + whole + behind.shape[1], device=ids.device)
        inputs = torch.cat([front, images.to(front.dtype), behind], 1)
        hidden = self.core.language_model(
            inputs_embeds=inputs,
            position_ids=torch.cat([order[:head], place, order[head + whole :]]).expand(len(ids), -1),
            attention_mask=inputs.new_ones(inputs.shape[:2]),  # else a gap in the positions parts two sequences
            use_cache=False,
        ).last_hidden_state
        return self.model.lm_head(hidden[:, -behind.shape[1] :]).float()


def tokens(method: QueCC, states: Tensor, levels: Tensor, of: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """What the method makes of pictures for many questions, without reading a picture twice.

    states: (pictures, n, width). levels: (pictures, n, levels, width). of: (pairs,) the picture of each. asked: (pairs,
    hidden). Returns (pairs, kept, hidden), and (kept,) where these stand.
    """
    weights, budget = method.tensors, torch.tensor([int(method.keep)], device=states.device)
    member, place = cut(budget, (GRID, GRID), int(method.keep))
    query = queries(states[of], asked if method.question == "own" else None, member, place, weights)
    keys, values = keys_and_values(levels, weights)
    read = attend(query, keys[of], values[of], member, weights)
    *_, amid = cells(budget, (GRID, GRID))
    return mlp(read, weights, "project"), amid.flatten().nonzero().flatten()


class Onlooker(QueCC):
    """Changes nothing; notes what it is shown of pictures and questions."""

    def merge(self, tokens: EncoderTokens, keep: Tensor) -> None:
        self.__dict__.setdefault("seen", []).append(tokens)


@torch.no_grad()
def shown(model: Any, batch: plugin.Batch) -> Shown:
    """What the engine shows of the pictures and questions of a batch."""
    onlooker = Onlooker().holding({})
    with foveate.prune(model, onlooker):
        plugin.answer_loss(model, batch)
    flat = [(each.states.flatten(0, 1), each.levels.flatten(0, 1), each.question) for each in onlooker.seen]
    states, levels, asked = (torch.cat(parts).float() for parts in zip(*flat, strict=True))
    return states, levels, asked


@torch.no_grad()
def begin(looks: Iterable[Shown], weights: dict[str, Tensor]) -> None:
    """Let cells begin by reading what is least like the mean patch, and let all that questions differ in be as loud.

    Means of patches are nothing that the LLM knows, and most patches are background. At the end of a question the LLM
    knows what kind of answer is due, and what is asked about is a thousandth of the variance.
    """
    states, levels, asked = (torch.cat(parts) for parts in zip(*looks, strict=True))
    loud = states.std(-1).mean()
    keys, _ = keys_and_values(levels.unsqueeze(0), weights)
    weights["attend.out.weight"] *= loud
    weights["attend.in.weight"][0] *= 2
    weights["attend.in.bias"][0] = -keys.mean((0, 2))
    apart = asked - asked.mean(0)
    variance, directions = torch.linalg.eigh(apart.T @ apart / len(apart))
    even = (directions * (variance + 1e-3 * variance.mean()).rsqrt()).T.flip(0)
    rows = min(even.shape[0], weights["text.weight"].shape[0])
    weights["text.weight"].zero_()[:rows] = even[:rows]
    weights["text.bias"] = -weights["text.weight"] @ asked.mean(0)
    weights["text.norm.weight"] *= loud


def train(options: argparse.Namespace) -> list[dict[str, float]]:
    """Runs the steps that are left, and returns the log."""
    model, processor = plugin.load(options)
    method, joint = QueCC(keep=options.keep, question=options.question), processor if options.joint else None
    if options.data is not None:
        talks = plugin.Talks(processor, options.data, options.batch, options.seed)

        def answers(held: TrainedMethod, batch: plugin.Batch, step: int) -> dict[str, Tensor]:
            return plugin.answer_loss(model, batch)

        first = partial(begin, (shown(model, batch) for batch in islice(talks(0), LOOKS)))
        return plugin.train(options, model, method, talks, answers, first, joint)
    model.set_attn_implementation("eager")  # of short rows, on a CPU, the quickest backwards
    glimpse = Glimpse(model, processor, options.questions)

    def lessons(held: TrainedMethod, batch: plugin.Batch, step: int) -> dict[str, Tensor]:
        assert isinstance(held, QueCC)
        with half_precision(model.device):
            return glimpse.loss(held, {name: value.to(model.device) for name, value in batch.items()})

    batches = partial(glimpse.batches, options)
    first = partial(begin, (glimpse.shown(method, batch) for batch in islice(batches(0), LOOKS)))
    return plugin.train(options, model, method, batches, lessons, first, joint)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = plugin.parser(__doc__, steps=500, batch=8, rate=2e-3)
    parser.add_argument("--keep", type=int, default=QueCC.keep, help="tokens that each image becomes")
    parser.add_argument("--joint", action="store_true", help="train the LLM along, and write a model of its own")
    parser.add_argument("--questions", type=int, default=8, help="how many about each of glimpse's pictures")
    parser.add_argument("--question", choices=("own", "none"), default="own", help="whether the question takes part")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_script(lambda: train(parse()))
