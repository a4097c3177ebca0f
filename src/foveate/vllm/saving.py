"""What a server will save: the tokens of a picture of some size, before and after. Needs no vLLM and no weights."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..families.base import Family
from ..methods.selection import kept_tokens

SIZES = ((336, 336), (640, 480), (1280, 720), (1080, 1920))
"""Of pictures, (width, height), that people send."""


class Saving(NamedTuple):
    """size: of the picture, (width, height). before, after: its tokens in the prompt."""

    size: tuple[int, int]
    before: int
    after: int


def saving(processor: Any, config: Any, family: Family, keep: float | int, size: tuple[int, int]) -> Saving:
    """Lay out a grey picture of this size as the model's processor does.

    processor: of transformers. keep: of the server.
    """
    from PIL import Image

    picture = Image.new("RGB", size, "grey")
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = processor(text=[processor.image_token], images=[picture], return_tensors="pt")
    layout = family.layouts(config, dict(inputs))[0]
    return Saving(size, layout.tokens, kept_tokens(layout, keep))
