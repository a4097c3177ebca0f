"""What a user says of coming calls that no input of a model tells."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from .steps import Steps
from .target import Target


class Sayings:
    """The part of a pruned model by which its user says something, each time for the calls in a block."""

    _target: Target
    _steps: Steps

    @contextlib.contextmanager
    def prompt(self, tokens: int) -> Iterator[None]:
        """Say how many tokens of the plain forwards in this block are the prompt: an answer behind it is only scored.

        Methods then choose as for `generate()`, at the prompt's end, and what they evict is hidden from the answer.
        `labels` say the same: the prompt ends where they begin. tokens: with padding on the left, at least 1.

        Raises:
            ValueError: for a number below 1, and in the forward where it has fewer tokens.
        """
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"a prompt has at least 1 token, got {tokens!r}")
        outer, self._steps.prompt = self._steps.prompt, tokens
        try:
            yield
        finally:
            self._steps.prompt = outer

    def clips(self, frames: int | Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """Say which of the pictures that come in this block are frames of clips, where frames are pictures to a model.

        A clip is then one image to every method: `keep` is of all its frames together, and methods that compare frames
        see them. Videos that a model takes as videos need no word, but for models that take the frames of a video as
        videos of their own (Kimi K2.5, MiniCPM-V 4.6): where such come, what is said is of them, not of pictures.

        frames: how many pictures each clip is of, 1 for a picture, in order and for the whole batch; or one number, for
        clips that all have as many.

        Raises:
            ValueError: for a clip without frames.
            UnsupportedError: in the call, where other pictures come.
        """
        return self._target.clips.said(frames)

    @contextlib.contextmanager
    def saying(self, *, image_sizes: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Say of the images in this block what no input of the model tells.

        image_sizes: (height, width) of each picture in pixels, in order, as it went into the processor. Models that
        cut pictures into tiles without a word on rows and columns need them to say where the tiles lie.
        """
        outer = dict(self._target.said)
        self._target.said.update(image_sizes=[(int(height), int(width)) for height, width in image_sizes])
        try:
            yield
        finally:
            self._target.said.clear()
            self._target.said.update(outer)
