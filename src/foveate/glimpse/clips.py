"""Short clips of the small world: the same things on the same ground through a few frames, one thing happening to each.

A thing stands still, moves a cell a frame for a frame or two, appears, disappears, or changes its colour. No cell is
ever taken twice, so that a place and a thing are one. Everything follows from a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from foveate.glimpse.drawing import render
from foveate.glimpse.scene import COLOURS, PATCH, SHAPES, Scene, Thing

SIZE = 112  # pixels a side of a frame as the model sees it, so 8 x 8 patches
TOKENS = (SIZE // PATCH) ** 2  # image tokens of a frame
FRAMES = 6
LENGTHS = (4, 5, 6, 7, 8)  # frames that a clip may have
SPRITES = (
    "dog", "cat", "horse", "pig", "elephant", "frog", "duck", "crab",
    "apple", "banana", "tree", "car", "rocket", "house", "ball", "balloon",
)  # fmt: skip
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows, columns
SCRIPTS = {"still": 0.2, "moves": 0.4, "appears": 0.15, "disappears": 0.15, "turns": 0.1}
SHAPE_SCRIPTS = {"still": 0.15, "moves": 0.25, "appears": 0.1, "disappears": 0.1, "turns": 0.4}  # only shapes turn


@dataclass(frozen=True)
class Track:
    """One thing through a clip: as it is in each frame, None where it is not there."""

    frames: tuple[Thing | None, ...]

    @property
    def seen(self) -> tuple[Thing, ...]:
        """As it is in the frames that show it, one or more."""
        return tuple(thing for thing in self.frames if thing is not None)

    @property
    def kind(self) -> str:
        """What it is, whatever its colour: a clip has one of each kind."""
        return self.seen[0].kind

    @property
    def direction(self) -> str:
        """Where it moves: left, right, up, down or nowhere."""
        first, last = self.seen[0].cell, self.seen[-1].cell
        step = (np.sign(last // 3 - first // 3), np.sign(last % 3 - first % 3))
        return next((name for name, way in DIRECTIONS.items() if way == step), "nowhere")

    @property
    def happening(self) -> str:
        """What happens to it, as in "moves left", "appears", "disappears", "turns red", "nothing"."""
        if self.frames[0] is None:
            return "appears"
        if self.frames[-1] is None:
            return "disappears"
        if self.direction != "nowhere":
            return f"moves {self.direction}"
        colour = self.seen[-1].detail
        return "nothing" if colour == self.seen[0].detail else f"turns {colour}"

    @property
    def when(self) -> int | None:
        """The first frame that differs from the one before it; None where all are the same."""
        changes = (frame for frame in range(1, len(self.frames)) if self.frames[frame] != self.frames[frame - 1])
        return next(changes, None)


@dataclass(frozen=True)
class Clip:
    """Things through the same number of frames, in reading order of their first cells, and the background's seed."""

    tracks: tuple[Track, ...]
    background: int

    def __len__(self) -> int:
        return len(self.tracks[0].frames)

    def until(self, frames: int) -> Clip:
        """What has been seen of it after the first `frames` frames; a thing that none of them shows is not in it."""
        cut = (Track(track.frames[:frames]) for track in self.tracks)
        return Clip(tuple(track for track in cut if track.seen), self.background)

    def scenes(self) -> Iterator[Scene]:
        """Its frames, one after the other."""
        for states in zip(*(track.frames for track in self.tracks), strict=True):
            yield Scene(tuple(thing for thing in states if thing is not None), self.background)

    def pictures(self, size: int = SIZE) -> tuple[Image.Image, ...]:
        """Its frames, painted `size` x `size` pixels large."""
        return tuple(render(scene, size) for scene in self.scenes())


def imagine(rng: np.random.Generator, frames: int = FRAMES) -> Clip:
    """Draw a clip of two to four things at random; at least one thing is there from the first frame on."""
    names = [*rng.permutation(SPRITES)[:4], *rng.permutation(SHAPES)[:3]]
    weights = np.array([0.6 / 4] * 4 + [0.4 / 3] * 3)
    kinds = rng.choice(names, int(rng.integers(2, 5)), replace=False, p=weights)
    cells = [int(cell) for cell in rng.permutation(9)[: len(kinds)]]
    taken = set(cells)
    tracks: list[Track] = []
    for kind, cell in zip(kinds, cells, strict=True):
        scripts = SHAPE_SCRIPTS if kind in SHAPES else SCRIPTS
        script = str(rng.choice(list(scripts), p=list(scripts.values())))
        if len(tracks) == len(kinds) - 1 and all(track.frames[0] is None for track in tracks) and script == "appears":
            script = "still"  # the first frame is never empty
        tracks.append(_act(script, _thing(str(kind), cell, rng), frames, taken, rng))
    tracks.sort(key=lambda track: track.seen[0].cell)
    return Clip(tuple(tracks), int(rng.integers(2**31)))


def _thing(kind: str, cell: int, rng: np.random.Generator) -> Thing:
    x, y = (np.array([cell % 3, cell // 3]) + 0.5 + rng.uniform(-0.12, 0.12, 2)) / 3
    detail = str(rng.choice(list(COLOURS))) if kind in SHAPES else ""
    size, angle, brightness = rng.uniform((0.28, -15, 0.8), (0.36, 15, 1.15))
    return Thing(kind, detail, cell, float(x), float(y), float(size), float(angle), float(brightness))


def _act(script: str, thing: Thing, frames: int, taken: set[int], rng: np.random.Generator) -> Track:
    """The thing through the frames. taken: cells that some thing is in at some time, to which a move adds its own."""
    frame = int(rng.integers(1, frames))
    if script == "appears":
        return Track((None,) * frame + (thing,) * (frames - frame))
    if script == "disappears":
        return Track((thing,) * frame + (None,) * (frames - frame))
    if script == "turns" and thing.kind in SHAPES:
        other = str(rng.choice([colour for colour in COLOURS if colour != thing.detail]))
        return Track((thing,) * frame + (replace(thing, detail=other),) * (frames - frame))
    paths = list(_paths(thing.cell, taken, frames - frame)) if script == "moves" else []
    if not paths:
        return Track((thing,) * frames)
    path = paths[rng.integers(len(paths))]
    taken.update(path)
    passed = [_moved(thing, cell) for cell in path]
    return Track((thing,) * frame + (*passed, *passed[-1:] * frames)[: frames - frame])


def _paths(cell: int, taken: set[int], most: int) -> Iterator[tuple[int, ...]]:
    """Straight ways of one or two free cells, at most `most`, from a cell on."""
    for down, right in DIRECTIONS.values():
        path: tuple[int, ...] = ()
        for far in range(1, min(2, most) + 1):
            row, column = cell // 3 + down * far, cell % 3 + right * far
            if not (0 <= row < 3 and 0 <= column < 3) or 3 * row + column in taken:
                break
            path += (3 * row + column,)
            yield path


def _moved(thing: Thing, cell: int) -> Thing:
    """The thing at the same spot of another cell."""
    right, down = cell % 3 - thing.cell % 3, cell // 3 - thing.cell // 3
    return replace(thing, cell=cell, x=thing.x + right / 3, y=thing.y + down / 3)
