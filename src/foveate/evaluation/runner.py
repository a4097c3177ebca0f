"""Batched greedy answers through the model's own `generate()`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from .questions import Item

Pictures = Image.Image | Sequence[Image.Image]


@dataclass(frozen=True)
class Batch:
    """Model inputs of some questions, and where in the list of all questions each of them stands."""

    indices: list[int]
    inputs: Any


class Batches:
    """Left-padded model inputs of many questions, to be gone through as often as wanted.

    Alike questions share a batch, so that short answers do not wait for long ones. What fits into `memory` bytes is
    kept, the rest is made anew each time. refused: what the processor does not take, by index, and why; it is in no
    batch.
    """

    def __init__(self, processor: Any, items: Sequence[Item], batch_size: int, memory: int = 2**30) -> None:
        self.processor, self.items = processor, items
        self.refused: dict[int, str] = {}
        self._kept: dict[int, Any] = {}
        order = sorted(range(len(items)), key=lambda index: items[index].question)
        groups = [self._check(order[start : start + batch_size], memory) for start in range(0, len(order), batch_size)]
        self._groups = [group for group in groups if group]

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Batch]:
        for group in self._groups:
            yield Batch(group, self._kept[group[0]] if group[0] in self._kept else self._inputs(group))

    def _check(self, group: list[int], memory: int) -> list[int]:
        """The questions of a group that the processor takes."""
        try:
            inputs = self._inputs(group)
        except Exception as error:  # processors raise anything, e.g. for a picture that is too thin
            if len(group) == 1:
                self.refused[group[0]] = " ".join(str(error).split()) or type(error).__name__
                return []
            return [index for each in group for index in self._check([each], 0)]
        size = sum(value.nbytes for value in inputs.values())
        if size + sum(value.nbytes for kept in self._kept.values() for value in kept.values()) <= memory:
            self._kept[group[0]] = inputs
        return group

    def _inputs(self, group: list[int]) -> Any:
        items = [self.items[index] for index in group]
        return model_inputs(self.processor, [item.pictures() for item in items], [item.question for item in items])


def model_inputs(processor: Any, images: Sequence[Pictures], questions: Sequence[str]) -> Any:
    """Left-padded inputs of one batch through the chat template.

    images: a picture, or several, for each question.
    """
    placeholder = getattr(processor, "image_token", None)
    if placeholder and any(placeholder in question for question in questions):
        raise ValueError(f"the question holds {placeholder}, which stands for an image: leave it out")
    return processor.apply_chat_template(
        [[_ask(pictures, question)] for pictures, question in zip(images, questions, strict=True)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def prepare(processor: Any, images: Sequence[Pictures], questions: Sequence[str], batch_size: int = 32) -> list[Batch]:
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
) -> list[str]:
    """Greedy answers to prepared questions, in the order of the questions.

    after: called when a batch is done.
    """
    import torch

    answers: dict[int, str] = {}
    for batch in batches:
        inputs = batch.inputs.to(model.device, model.dtype)
        with torch.inference_mode():
            tokens = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
        texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.update(zip(batch.indices, (text.strip() for text in texts), strict=True))
        if after is not None:
            after()
    return [answers[index] for index in sorted(answers)]


def answer(
    model: Any,
    processor: Any,
    images: Sequence[Pictures],
    questions: Sequence[str],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
) -> list[str]:
    """What the model says to each question about its picture: chat template, left padding, greedy."""
    return generate(model, processor, prepare(processor, images, questions, batch_size), max_new_tokens)


def _ask(pictures: Pictures, question: str) -> dict[str, Any]:
    pictures = [pictures] if isinstance(pictures, Image.Image) else pictures
    content = [{"type": "image", "image": picture.convert("RGB")} for picture in pictures]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}
