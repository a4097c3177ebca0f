"""Batched greedy answers through the model's own `generate()`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image


@dataclass(frozen=True)
class Batch:
    """Model inputs of some questions, and where in the list of all questions each of them stands."""

    indices: list[int]
    inputs: Any


def prepare(
    processor: Any, images: Sequence[Image.Image], questions: Sequence[str], batch_size: int = 32
) -> list[Batch]:
    """Left-padded model inputs, one picture a question, to be used as often as wanted.

    Alike questions share a batch, so that short answers do not wait for long ones.
    """
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images for {len(questions)} questions; give one image for each question")
    order = sorted(range(len(questions)), key=questions.__getitem__)
    batches = []
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        chats = [[_ask(images[index], questions[index])] for index in indices]
        inputs = processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        batches.append(Batch(indices, inputs))
    return batches


@torch.inference_mode()
def generate(model: Any, processor: Any, batches: Sequence[Batch], max_new_tokens: int = 64) -> list[str]:
    """Greedy answers to prepared questions, in the order of the questions."""
    answers: dict[int, str] = {}
    for batch in batches:
        inputs = batch.inputs.to(model.device, model.dtype)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.update(zip(batch.indices, (text.strip() for text in texts), strict=True))
    return [answers[index] for index in sorted(answers)]


def answer(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
) -> list[str]:
    """What the model says to each question about its picture: chat template, left padding, greedy."""
    return generate(model, processor, prepare(processor, images, questions, batch_size), max_new_tokens)


def _ask(image: Image.Image, question: str) -> dict[str, Any]:
    content = [{"type": "image", "image": image.convert("RGB")}, {"type": "text", "text": question}]
    return {"role": "user", "content": content}
