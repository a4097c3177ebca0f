"""What a user should know about an answer of the built-in models: they know a small drawn world, and say something
whatever they are shown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from foveate.asking.clips import frames_of
from foveate.asking.loading import BUILT_IN

if TYPE_CHECKING:
    from PIL.Image import Image

    from foveate.asking.clips import Clip

SIDE = 56  # pixels that divide the side of whatever glimpse was shown: its pictures and frames are square


def hints(model: str, processor: Any, shown: Sequence[Image | Clip], question: str) -> Iterator[str]:
    """A sentence for what the model never learned; none for models that foveate does not bring.

    model: as the user named it.
    """
    if model not in BUILT_IN:
        return
    pictures = [frame for one in shown for frame in frames_of(one)]
    if any(picture.width != picture.height or picture.width % SIDE for picture in pictures):
        yield f"{model} knows nothing but drawn pictures like examples/demo.png: for others give a --model"
    tokenizer, unknown = processor.tokenizer, processor.tokenizer.unk_token_id
    words = [word for word in re.findall(r"\w+", question) if unknown in tokenizer(word)["input_ids"]]
    if words:
        yield f"{model} never learned {', '.join(map(repr, words))}: ask in English, about what is drawn"
