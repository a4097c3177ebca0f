"""glimpse: a tiny vision-language model inside the package, trained from nothing on a small drawn world.

It is a plain LLaVA (`LlavaForConditionalGeneration`: CLIP-style ViT with CLS, MLP projector, Llama with
grouped-query attention) with 144 image tokens, small enough to answer on a CPU at once, so that every method
can be tried offline. `load("small")` is a second model of the same family with a quarter of the parameters,
for methods in which a small model guides a large one, and `load("tiny")` a third, half as wide again, by which to see
what a smaller model costs; `load("cross")` is a small Llama-3.2-Vision (`MllamaForConditionalGeneration`), for methods
that trim what cross-attention reads; `load("video")` sees the frames of clips, each an image of 64 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveate.glimpse.clips import FRAMES
from foveate.glimpse.happenings import CLIP_KINDS, clip_question
from foveate.glimpse.world import KINDS, Question, question

__all__ = [
    "CLIPS_VERSION",
    "CLIP_KINDS",
    "CROSS_PATH",
    "HELDOUT_VERSION",
    "KINDS",
    "ONE_PICTURE",
    "PATH",
    "SMALL_PATH",
    "TINY_PATH",
    "VIDEO_PATH",
    "Question",
    "heldout",
    "heldout_clips",
    "load",
]

PATH = Path(__file__).with_name("model")
"""Folder of the model, as `transformers` loads it."""

SMALL_PATH = Path(__file__).with_name("small")
"""Folder of the small model; its processor is the one in `PATH`."""

TINY_PATH = Path(__file__).with_name("tiny")
"""Folder of the tiny model; its processor is the one in `PATH`, too."""

CROSS_PATH = Path(__file__).with_name("cross")
"""Folder of the model with cross-attention and its processor."""

VIDEO_PATH = Path(__file__).with_name("video")
"""Folder of the model that sees clips and its processor, which knows more words."""

ONE_PICTURE = tuple(kind for kind in KINDS if kind not in ("which", "each"))
"""Kinds of questions about one picture. The model with cross-attention knows no others: nothing tells it which of
several pictures a feature is of."""

HELDOUT_VERSION = 2
"""Changes whenever a picture, question or answer of `heldout` does."""

CLIPS_VERSION = 1
"""The same for `heldout_clips`."""


def load(size: str = "glimpse", **kwargs: Any) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its processor.

    `size` is "glimpse" (4.8 million parameters), "small" (1.3 million: the same layers, half as wide), "tiny" (0.4
    million: half as wide again), "cross" (1.4 million, with cross-attention), or "video" (1.3 million, for clips). All
    but the last know the same world and words; the first three also have the same processor, and image tokens in the
    same places of a prompt. `kwargs` go to
    `AutoModelForImageTextToText.from_pretrained`; without `dtype` the weights, shipped in bfloat16, compute in float32.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    folders = {"glimpse": PATH, "small": SMALL_PATH, "tiny": TINY_PATH, "cross": CROSS_PATH, "video": VIDEO_PATH}
    if size not in folders:
        raise ValueError(f"no glimpse of size {size!r}: there are {', '.join(folders)}")
    kwargs.setdefault("dtype", "float32")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it is over at once
    try:
        model = AutoModelForImageTextToText.from_pretrained(folders[size], **kwargs)
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval(), AutoProcessor.from_pretrained(PATH if size in ("small", "tiny") else folders[size])


def heldout(n: int = 2000, *, kinds: Sequence[str] = KINDS, first: int = 0) -> list[Question]:
    """`n` held-out questions from number `first` on, each about its own picture or pictures, `kinds` in turn.

    They are drawn again from their seeds, which training never uses. Tables are made of the first ones; what a default
    is chosen by should begin at 500,000 or beyond.
    """
    numbers = range(first, first + n)
    return [question(HELDOUT_VERSION * 1_000_000 + number, kinds[number % len(kinds)]) for number in numbers]


def heldout_clips(
    n: int = 2000, *, kinds: Sequence[str] = CLIP_KINDS, first: int = 0, frames: int = FRAMES
) -> list[Question]:
    """The same about clips: `images` of each are the `frames` (4 to 8) pictures of a clip of its own."""
    numbers = range(first, first + n)
    return [clip_question(CLIPS_VERSION * 1_000_000 + number, kinds[number % len(kinds)], frames) for number in numbers]
