"""Greedy answers through the model's own `generate()`, in batches, and in several turns on one KV cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from foveate.asking.clips import Clip, in_turn, pictures_each, told
from foveate.engine.upstream import cache_behind, cache_name

if TYPE_CHECKING:
    from .questions import Item

Shown = Image.Image | Clip | Sequence[Image.Image | Clip]


@dataclass(frozen=True)
class Batch:
    """Model inputs of some questions, and where in the list of all questions each of them stands.

    talk: the one question, where earlier ones come in front of it in turns of their own; the inputs are those of the
    first. clips: of how many pictures each clip and picture is, for `Pruned.clips`; None where there is nothing to say.
    """

    indices: list[int]
    inputs: Any
    talk: Item | None = None
    clips: list[int] | None = None


class Batches:
    """Left-padded model inputs of many questions, to be gone through as often as wanted.

    Alike questions share a batch, so that short answers do not wait for long ones; talks of several turns have one
    each, since what pads them would lie between the turns. What fits into `memory` bytes is kept, the rest is made
    anew each time. refused: what the processor does not take, by index, and why; it is in no batch.
    """

    def __init__(self, processor: Any, items: Sequence[Item], batch_size: int, memory: int = 2**30) -> None:
        self.processor, self.items = processor, items
        self.refused: dict[int, str] = {}
        self._kept: dict[int, Batch] = {}
        order = sorted(range(len(items)), key=lambda index: items[index].question)
        alone = [[index] for index in order if items[index].before]
        order = [index for index in order if not items[index].before]
        groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)] + alone
        self._groups = [group for each in groups if (group := self._check(each, memory))]

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Batch]:
        for group in self._groups:
            yield self._batch(group)

    def mixed(self) -> Iterator[Batch]:
        """The same in an order that mixes kinds of questions, so that the first ones speak for all."""
        groups = list(self._groups)
        random.Random(0).shuffle(groups)
        return map(self._batch, groups)

    @property
    def middle(self) -> Batch:
        """One of them that stands for all."""
        return self._batch(self._groups[len(self._groups) // 2])

    def _batch(self, group: list[int]) -> Batch:
        return self._kept[group[0]] if group[0] in self._kept else self._make(group)

    def _check(self, group: list[int], memory: int) -> list[int]:
        """The questions of a group that the processor takes."""
        try:
            batch = self._make(group)
        except Exception as error:  # processors raise anything, e.g. for a picture that is too thin
            if len(group) == 1:
                self.refused[group[0]] = " ".join(str(error).split()) or type(error).__name__
                return []
            return [index for each in group for index in self._check([each], 0)]
        if sum(value.nbytes for kept in (batch, *self._kept.values()) for value in kept.inputs.values()) <= memory:
            self._kept[group[0]] = batch
        return group

    def _make(self, group: list[int]) -> Batch:
        items = [self.items[index] for index in group]
        shown = [item.shown() for item in items]
        inputs = model_inputs(self.processor, shown, [item.asked[0] for item in items])
        talk = items[0] if items[0].before else None
        return Batch(group, inputs, talk, pictures_each([one for each in shown for one in each], inputs))


def model_inputs(processor: Any, images: Sequence[Shown], questions: Sequence[str]) -> Any:
    """Left-padded inputs of one batch through the chat template.

    images: a picture or a clip, or several, for each question.
    """
    shown = [_listed(one) for one in images]
    talks = [[_turn("user", question, one, processor)] for one, question in zip(shown, questions, strict=True)]
    return _encode(processor, talks, [one for each in shown for one in each])


def _encode(processor: Any, talks: Sequence[Sequence[dict[str, Any]]], shown: Sequence[Image.Image | Clip]) -> Any:
    texts = [part.get("text", "") for talk in talks for turn in talk for part in turn["content"]]
    for what in ("image", "video"):
        placeholder = getattr(processor, f"{what}_token", None)
        if placeholder and any(placeholder in text for text in texts):
            raise ValueError(f"the question holds {placeholder}, which stands for an image: leave it out")
    return processor.apply_chat_template(
        [list(talk) for talk in talks],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, **told(shown, processor)},
    )


def prepare(processor: Any, images: Sequence[Shown], questions: Sequence[str], batch_size: int = 32) -> list[Batch]:
    """Left-padded model inputs, to be used as often as wanted; alike questions share a batch."""
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images for {len(questions)} questions; give one image for each question")
    order = sorted(range(len(questions)), key=questions.__getitem__)
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [
        Batch(group, model_inputs(processor, [images[i] for i in group], [questions[i] for i in group]))
        for group in groups
    ]


def generate(
    model: Any,
    processor: Any,
    batches: Iterable[Batch],
    max_new_tokens: int = 64,
    after: Callable[[], object] | None = None,
    *,
    one_cache: bool = True,
    around: Callable[[Batch], AbstractContextManager[Any]] = lambda batch: nullcontext(),
    listeners: Sequence[Any] = (),
) -> list[str]:
    """Greedy answers to prepared questions, in the order of the questions; of talks, to the last one.

    after: called when a batch has answered what was asked beside its pictures. one_cache: whether a talk goes on on the
    cache of its earlier turns; else each turn is a prompt of its own that begins with the pictures. around: what is
    entered for each batch, such as `clips_said`. listeners: logits processors that change nothing, such as `Sure`.
    """
    import torch

    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
    options["logits_processor"] = list(listeners)
    answers: dict[int, str] = {}
    for batch in batches:
        inputs, talk = batch.inputs.to(model.device, model.dtype), batch.talk
        options["return_dict_in_generate"] = talk is not None and one_cache
        with torch.inference_mode(), around(batch):
            said = model.generate(**inputs, **options)
            texts = _heard(processor, inputs, said)
            if after is not None:
                after()
            shown = talk.shown() if talk is not None and not one_cache else []
            turns = [_turn("user", talk.asked[0], shown, processor)] if talk is not None and not one_cache else []
            for question in talk.asked[1:] if talk is not None else ():
                if one_cache:
                    inputs = next_turn(processor, model, inputs, said, question)
                else:
                    turns += [_turn("assistant", texts[0]), _turn("user", question)]
                    inputs = _encode(processor, [turns], shown).to(model.device, model.dtype)
                said = model.generate(**inputs, **options)
                texts = _heard(processor, inputs, said)
        answers.update(zip(batch.indices, texts, strict=True))
    return [answers[index] for index in sorted(answers)]


def _heard(processor: Any, inputs: Any, said: Any) -> list[str]:
    """The answers in what `generate()` returned."""
    sequences = getattr(said, "sequences", said)
    texts = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def next_turn(processor: Any, model: Any, inputs: Any, said: Any, question: str) -> dict[str, Any]:
    """What `generate()` needs to go on with one more question, on the cache of what was said.

    inputs: of one talk, the last turn's. said: what `generate()` returned, with its cache.
    """
    import torch

    mark = "4f9d2c71"  # stands for what was said
    talk = [_turn("user", "?"), _turn("assistant", mark), _turn("user", question)]
    text = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False).rpartition(mark)[2]
    words = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
    ends = torch.tensor(model.generation_config.eos_token_id, device=model.device).view(-1)
    spoken = said.sequences
    if bool(torch.isin(spoken[0, -1], ends)):
        spoken = spoken[:, :-1]  # the template writes the end of an answer itself
    ids = torch.cat([spoken, words], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # What cross-attention reads goes on as at the last token.
    length = inputs["input_ids"].shape[1]
    for name, value in inputs.items():
        if name.startswith("cross_") and value.ndim > 2 and value.shape[1] == length:
            more = value[:, -1:].expand(-1, ids.shape[1] - length, *value.shape[2:])
            turn[name] = torch.cat([value, more], 1)
    return {**turn, cache_name(model.forward): cache_behind(said)}


def answer(
    model: Any,
    processor: Any,
    images: Sequence[Shown],
    questions: Sequence[str],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
) -> list[str]:
    """What the model says to each question about its picture: chat template, left padding, greedy."""
    return generate(model, processor, prepare(processor, images, questions, batch_size), max_new_tokens)


def clips_said(pruned: Any) -> Callable[[Batch], AbstractContextManager[Any]]:
    """For `generate`: tell a pruned model of each batch which pictures are the frames of a clip.

    pruned: what `foveate.prune` returned; None for the untouched model, which is told nothing.
    """
    return lambda batch: pruned.clips(batch.clips) if pruned is not None and batch.clips else nullcontext()


def _listed(shown: Shown) -> Sequence[Image.Image | Clip]:
    return [shown] if isinstance(shown, (Image.Image, Clip)) else shown


def _turn(role: str, text: str, shown: Shown = (), processor: Any = None) -> dict[str, Any]:
    content = in_turn(_listed(shown), processor)
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}
