"""Which of the pictures that come are frames of a clip: no model's inputs say it where frames come one by one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from ..errors import UnsupportedError
from ..layout import ImageLayout, as_clip

Frames = int | Sequence[int]


class Clips(threading.local):
    """What the user says of the pictures of coming prompts, in each thread on its own.

    frames: of how many pictures each clip or picture is, in order, or one number for all; None where nothing was said.
    """

    frames: Frames | None = None

    @contextlib.contextmanager
    def said(self, frames: Frames) -> Iterator[None]:
        """Within this block pictures come so."""
        for count in [frames] if isinstance(frames, int) else frames:
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"a clip has at least 1 frame, got {count!r}")
        outer, self.frames = self.frames, frames
        try:
            yield
        finally:
            self.frames = outer

    def joined(self, pictures: Sequence[ImageLayout]) -> list[ImageLayout]:
        """The layouts of the pictures, those of each clip as one.

        Raises:
            UnsupportedError: where there are other pictures than was said.
        """
        if self.frames is None:
            return list(pictures)
        if isinstance(self.frames, int):
            counts: Sequence[int] = [self.frames] * (len(pictures) // self.frames)
        else:
            counts = self.frames
        if sum(counts) != len(pictures):
            raise UnsupportedError(
                f"clips were said to have {self.frames} frames, and {len(pictures)} pictures came: say for all of them "
                "how many each clip has, 1 for a picture"
            )
        left = iter(pictures)
        return [as_clip([next(left) for _ in range(count)]) if count > 1 else next(left) for count in counts]


def of_samples(frames: Sequence[ImageLayout], tokens: Sequence[int]) -> list[ImageLayout]:
    """Of each sample the frames that follow one another in one shape as a clip. tokens: placeholders of each sample."""
    clips: list[list[ImageLayout]] = []
    left = list(frames)
    for count in tokens:
        first = True
        while left and count > 0:
            frame = left.pop(0)
            if first or frame.tiles[0].grid != clips[-1][0].tiles[0].grid:
                clips.append([])
            clips[-1].append(frame)
            count, first = count - frame.tokens, False
    return [as_clip(clip) for clip in [*clips, *([frame] for frame in left)]]
