"""What a picture of the world holds: its words, its things, and where they lie; everything follows from a seed.

A picture holds one to seven things, each in its own cell of a 3x3 grid (never near a border between two
cells, so that every place has one name): emoji sprites, coloured shapes, at most one printed number and one
printed word. Some pictures have a line of print instead, several words and numbers across a whole row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SPRITES = {
    "dog": "🐕", "cat": "🐈", "horse": "🐎", "cow": "🐄", "pig": "🐖", "rabbit": "🐇",
    "elephant": "🐘", "monkey": "🐒", "tiger": "🐅", "bear": "🐻", "panda": "🐼", "fox": "🦊",
    "frog": "🐸", "penguin": "🐧", "owl": "🦉", "duck": "🦆", "chicken": "🐔", "turtle": "🐢",
    "snake": "🐍", "whale": "🐳", "octopus": "🐙", "crab": "🦀", "bee": "🐝", "snail": "🐌",
    "ladybug": "🐞", "spider": "🕷", "apple": "🍎", "banana": "🍌", "lemon": "🍋", "pear": "🍐",
    "pineapple": "🍍", "carrot": "🥕", "mushroom": "🍄", "pizza": "🍕", "burger": "🍔", "donut": "🍩",
    "cake": "🎂", "tree": "🌳", "cactus": "🌵", "sunflower": "🌻", "rose": "🌹", "car": "🚗",
    "bus": "🚌", "bicycle": "🚲", "train": "🚂", "rocket": "🚀", "tractor": "🚜", "helicopter": "🚁",
    "house": "🏠", "clock": "⏰", "key": "🔑", "umbrella": "☔", "book": "📕", "guitar": "🎸",
    "drum": "🥁", "ball": "⚽", "balloon": "🎈", "crown": "👑", "hat": "🎩", "gift": "🎁",
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond")
COLOURS = {
    "red": (214, 40, 40), "orange": (247, 140, 20), "yellow": (250, 220, 40), "green": (40, 160, 60),
    "blue": (40, 80, 220), "purple": (140, 50, 180), "white": (250, 250, 250), "black": (20, 20, 20),
}  # fmt: skip
WORDS = (
    "stop", "exit", "open", "sale", "shop", "bank", "hotel", "park", "milk", "tea", "fish", "zoo",
    "north", "south", "east", "west", "hello", "yes", "cash", "wine", "music", "taxi", "push", "pull",
)  # fmt: skip
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")

SIZE = 168  # pixels a side of a picture as the model sees it
PATCH = 14  # pixels a side of one patch, so 12 x 12 patches
PRINT = 24 / 168  # height of print, as a fraction of the picture: one digit is as wide as one patch
PRINTED = ("number", "word", "line")  # kinds of things that are print
LINE = SIZE // PATCH  # patches that a line of print may be long


@dataclass(frozen=True)
class Thing:
    """One thing. `x`, `y` (centre) and `size` are fractions of the picture's side, `angle` is in degrees."""

    kind: str  # a sprite's name, a shape's name, "number", "word" or "line"
    detail: str  # the shape's colour, the digits, the word, the words of the line; "" for a sprite
    cell: int  # 0..8, row by row; of a line that in the middle of its row
    x: float
    y: float
    size: float
    angle: float
    brightness: float

    @property
    def name(self) -> str:
        """What an answer calls it, as in "dog", "red circle", "number 42", "line stop 42 tea"."""
        if self.kind in SHAPES:
            return f"{self.detail} {self.kind}"
        return f"{self.kind} {self.detail}".strip()

    @property
    def place(self) -> str:
        """Name of its cell, as in "top left"; of a line that of its row."""
        return ROWS[self.cell // 3] if self.kind == "line" else place(self.cell)


@dataclass(frozen=True)
class Scene:
    """Things in reading order, and the seed of the background behind them."""

    things: tuple[Thing, ...]
    background: int


def place(cell: int) -> str:
    """Name of a cell of the 3x3 grid, numbered row by row."""
    return f"{ROWS[cell // 3]} {COLUMNS[cell % 3]}"


def imagine(rng: np.random.Generator, least: int = 1, most: int = 7, more_print: float = 0.0) -> Scene:
    """Draw the content of a picture at random: `least` to `most` (at most 9) things.

    A line of print fills a row, so that fewer cells are left. One line, or one number and one word, is as much print
    as questions can be asked about; `more_print` is the share of further things that become print as well, for
    learning to read.
    """
    cells = [int(cell) for cell in rng.permutation(9)[: rng.integers(least, most + 1)]]
    things: list[Thing] = []
    special = []
    if rng.random() < 0.3:
        row = cells[0] // 3
        cells = [cell for cell in cells if cell // 3 != row]
        x, y = 0.5, (row + 0.5 + rng.uniform(-0.24, 0.24)) / 3
        things.append(Thing("line", _line(rng), 3 * row + 1, x, float(y), PRINT, 0.0, 1.0))
    else:
        special = [kind for kind in ("number", "word") if rng.random() < 0.55]
        if len(special) == 2:  # side by side they would look like a line
            apart = next((cell for cell in cells[1:] if cell // 3 != cells[0] // 3), None)
            if apart is None:
                special.pop()
            else:
                cells.remove(apart)
                cells.insert(1, apart)
    for index, cell in enumerate(cells):
        if index < len(special):
            kind, detail = _print_out(special[index], rng)
        elif rng.random() < more_print:
            kind, detail = _print_out(str(rng.choice(["number", "word"])), rng)
        elif things and things[-1].kind in SPRITES and rng.random() < 0.25:
            kind, detail = things[-1].kind, ""
        elif rng.random() < 0.22:
            kind, detail = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
        else:
            kind, detail = str(rng.choice(list(SPRITES))), ""
        printed = kind in PRINTED
        x, y = (np.array([cell % 3, cell // 3]) + 0.5 + rng.uniform(-0.24, 0.24, 2)) / 3
        size = rng.uniform(0.16, 0.22) if rng.random() < 0.3 else rng.uniform(0.24, 0.33)
        things.append(
            Thing(
                kind,
                detail,
                cell,
                float(x),
                float(y),
                size=PRINT if printed else float(size),
                angle=0.0 if printed else float(rng.uniform(-15, 15)),
                brightness=float(rng.uniform(0.8, 1.15)),
            )
        )
    return Scene(tuple(sorted(things, key=lambda thing: thing.cell)), int(rng.integers(2**31)))


def _print_out(kind: str, rng: np.random.Generator) -> tuple[str, str]:
    if kind == "word":
        return kind, str(rng.choice(WORDS))
    return kind, str(rng.integers(10, 1000 if rng.random() < 0.7 else 100))


def _line(rng: np.random.Generator) -> str:
    """Two to four words and numbers that fit beside each other."""
    texts: list[str] = []
    room = LINE
    for _ in range(rng.integers(2, 5)):
        text = _print_out(str(rng.choice(["number", "word"])), rng)[1]
        room -= len(text) + bool(texts)  # no letter is wider than a patch
        if room >= 0:
            texts.append(text)
    return " ".join(texts)
