"""glimpse: a tiny vision-language model inside the package, trained from nothing on a small drawn world.

It is a plain LLaVA (`LlavaForConditionalGeneration`: CLIP-style ViT with CLS, MLP projector, Llama with
grouped-query attention) with 144 image tokens, small enough to answer on a CPU at once, so that every method
can be tried offline. `load("small")` is a second model of the same family with a quarter of the parameters,
for methods in which a small model guides a large one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.glimpse.world import KINDS, Question, question

__all__ = ["HELDOUT_VERSION", "KINDS", "PATH", "SMALL_PATH", "Question", "heldout", "load"]

PATH = Path(__file__).with_name("model")
"""Folder of the model, as `transformers` loads it."""

SMALL_PATH = Path(__file__).with_name("small")
"""Folder of the small model; its processor is the one in `PATH`."""

HELDOUT_VERSION = 2
"""Changes whenever a picture, question or answer of `heldout` does."""


def load(size: str = "glimpse", **kwargs: Any) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its processor.

    `size` is "glimpse" (4.8 million parameters) or "small" (1.3 million: the same layers, half as wide). Both know the
    same world and read the same tokens: their processors are the same, and so are the places of image tokens in
    a prompt. `kwargs` go to `AutoModelForImageTextToText.from_pretrained`; without `dtype` the weights, shipped in
    bfloat16, compute in float32.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    folders = {"glimpse": PATH, "small": SMALL_PATH}
    if size not in folders:
        raise ValueError(f"no glimpse of size {size!r}: there are {' and '.join(folders)}")
    kwargs.setdefault("dtype", "float32")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it is over at once
    try:
        model = AutoModelForImageTextToText.from_pretrained(folders[size], **kwargs)
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval(), AutoProcessor.from_pretrained(PATH)


def heldout(n: int = 2000) -> list[Question]:
    """The first `n` held-out questions, each about its own picture, all kinds in turn.

    They are drawn again from their seeds, which training never uses.
    """
    return [question(HELDOUT_VERSION * 1_000_000 + index, KINDS[index % len(KINDS)]) for index in range(n)]
