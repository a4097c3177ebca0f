"""A model for lmms-eval: any Hugging Face model it knows how to talk to, pruned.

lmms_eval --model foveate --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=plphp,keep=0.4 --tasks ...
"""

from __future__ import annotations

import inspect
from typing import Any
from unittest.mock import patch

import torch
from lmms_eval.models.chat import huggingface
from lmms_eval.models.registry_v2 import ModelManifest
from transformers import AutoModelForImageTextToText

import foveate
from foveate import glimpse
from foveate.methods.grammar import parse_method, shared


class Foveate(huggingface.Huggingface):
    """lmms-eval's Hugging Face chat model with a method of foveate installed.

    pretrained: a model's id or folder, or "glimpse". method: a method's name, or several joined with "+"; None runs
    the untouched model, for comparison. What is no argument of lmms-eval's model is an option of every method that
    has one of that name, such as `keep=0.4`.

    Raises:
        ValueError: for an unknown method or option, or a value outside its range.
        foveate.UnsupportedError: for a model that cannot be pruned this way.
    """

    processor: Any

    def __init__(
        self,
        pretrained: str,
        method: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        **arguments: Any,
    ) -> None:
        theirs = inspect.signature(huggingface.Huggingface.__init__).parameters
        options = {name: value for name, value in arguments.items() if name not in theirs}
        methods = _methods(method, options)  # before the model is loaded, which may take minutes
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # 0.7.3 looks a model type up among configuration classes, finds nothing, and loads a model without generate().
        with patch.object(huggingface, "AutoModel", AutoModelForImageTextToText):
            super().__init__(
                pretrained=str(glimpse.PATH) if pretrained == "glimpse" else pretrained,
                device=device,
                device_map=device_map or device,
                **{name: value for name, value in arguments.items() if name in theirs},
            )
        self.processor = _WithoutEmpty(self.processor)
        self.pruned = foveate.prune(self.model, methods) if methods else None


def _methods(names: str | None, options: dict[str, Any]) -> list[foveate.Method]:
    if names is None:
        if options:
            raise ValueError(f"{', '.join(options)}: options of a method, but no method=... is given")
        return []
    parts = parse_method(names.strip("\"'"))  # quotes keep the commas of options together in --model_args
    return [foveate.get_method(p.name, **own) for p, own in zip(parts, shared(parts, options), strict=True)]


class _WithoutEmpty:
    """A processor that is not handed what a sample lacks: most refuse empty videos and audios."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        media = ("images", "videos", "audios")
        return self._processor(*args, **{k: v for k, v in kwargs.items() if k not in media or v})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)


def manifest() -> ModelManifest:
    """What lmms-eval's registry learns through the entry point."""
    return ModelManifest(model_id="foveate", chat_class_path=f"{__name__}.{Foveate.__qualname__}")
