"""A model for VLMEvalKit (the package `vlmeval`, installed from its repository): a Hugging Face model, pruned."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlmeval.vlm.base import BaseModel

import foveate
from foveate.methods.grammar import parse_method, shared


class Foveate(BaseModel):
    """Answers one interleaved message at a time, greedily, with a method of foveate installed.

    pretrained: a model's id or folder, with a chat template. method: a method's name, or several joined with "+"; None
    for the untouched model. options: of every method that has one of that name, such as `keep=0.4`. max_new_tokens:
    of an answer.

    Raises:
        ValueError: for an unknown method or option, or a value outside its range.
        foveate.UnsupportedError: for a model that cannot be pruned this way.
    """

    INTERLEAVE = True

    def __init__(
        self,
        pretrained: str,
        method: str | None = None,
        max_new_tokens: int = 512,
        dtype: str = "auto",
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if method is None and options:
            raise ValueError(f"{', '.join(options)}: options of a method, but no method is given")
        parts = () if method is None else parse_method(method)
        chosen = [foveate.get_method(p.name, **own) for p, own in zip(parts, shared(parts, options), strict=True)]
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = AutoProcessor.from_pretrained(pretrained)
        model: Any = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype)
        self.model = model.to(device).eval()
        self.max_new_tokens = max_new_tokens
        self.pruned = foveate.prune(self.model, chosen) if chosen else None

    @torch.inference_mode()
    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """Answer a message: parts of {"type": "image" | "text", "value": path | text}, in order."""
        images = [Image.open(part["value"]).convert("RGB") for part in message if part["type"] == "image"]
        content = [
            {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["value"]}
            for part in message
        ]
        chat = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(images=images or None, text=text, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        said = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return self.processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
