"""The small world that glimpse knows: pictures of a few things, and questions with exactly one right answer.

A picture holds one to six things, each in its own cell of a 3x3 grid (never near a border between two
cells, so that every place has one name): emoji sprites, coloured shapes, at most one printed number and one
printed word. Everything follows from a seed, so a picture and its questions can be drawn again anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
KINDS = ("what", "where", "exists", "count", "total", "colour", "number", "word", "describe")

ATLAS = Path(__file__).with_name("sprites.png")
ATLAS_COLUMNS = 10
SPRITE = 112  # pixels a side of one sprite in the atlas
SIZE = 168  # pixels a side of a picture as the model sees it
PATCH = 14  # pixels a side of one patch, so 12 x 12 patches
PRINT = 24 / 168  # height of print, as a fraction of the picture: one digit is as wide as one patch

ASK = {
    "what": (
        "What is at the {}?",
        "What do you see at the {}?",
        "What can be seen at the {}?",
        "What is in the {}?",
    ),
    "where": ("Where is the {}?", "Where do you see the {}?", "Where in the picture is the {}?"),
    "exists": ("Is there {}?", "Do you see {}?", "Does the picture show {}?", "Is there {} in the picture?"),
    "count": (
        "How many {} are there?",
        "How many {} do you see?",
        "How many {} are in the picture?",
        "Count the {}.",
    ),
    "total": (
        "How many things are there?",
        "How many things do you see?",
        "How many things are in the picture?",
        "Count all things.",
    ),
    "colour": ("What colour is the {}?", "Which colour does the {} have?", "What color is the {}?"),
    "number": (
        "What number is printed?",
        "Which number do you see?",
        "Read the number.",
        "What is the number?",
    ),
    "word": ("What word is printed?", "Which word do you see?", "Read the word.", "What does it say?"),
    "describe": (
        "Describe the picture.",
        "What is in the picture?",
        "What do you see?",
        "What does the picture show?",
    ),
}


@dataclass(frozen=True)
class Thing:
    """One thing. `x`, `y` (centre) and `size` are fractions of the picture's side, `angle` is in degrees."""

    kind: str  # a sprite's name, a shape's name, "number" or "word"
    detail: str  # the shape's colour, the digits, the word; "" for a sprite
    cell: int  # 0..8, row by row
    x: float
    y: float
    size: float
    angle: float
    brightness: float

    @property
    def name(self) -> str:
        """What an answer calls it, as in "dog", "red circle", "number 42", "word stop"."""
        if self.kind in SHAPES:
            return f"{self.detail} {self.kind}"
        return f"{self.kind} {self.detail}".strip()

    @property
    def place(self) -> str:
        """Name of its cell, as in "top left"."""
        return place(self.cell)


@dataclass(frozen=True)
class Scene:
    """Things in reading order, and the seed of the background behind them."""

    things: tuple[Thing, ...]
    background: int


@dataclass(frozen=True)
class Question:
    """A picture, a question about it, its one right answer, and the kind of question (one of `KINDS`)."""

    image: Image.Image
    question: str
    answer: str
    kind: str


def place(cell: int) -> str:
    """Name of a cell of the 3x3 grid, numbered row by row."""
    return f"{ROWS[cell // 3]} {COLUMNS[cell % 3]}"


def plural(name: str) -> str:
    """More than one of a sprite or shape."""
    return name + ("es" if name.endswith(("s", "x")) else "s")


def imagine(rng: np.random.Generator, least: int = 1, most: int = 6, more_print: float = 0.0) -> Scene:
    """Draw the content of a picture at random: `least` to `most` (at most 9) things.

    One number and one word are as much print as questions can be asked about; `more_print` is the share of further
    things that become print as well, for learning to read.
    """
    cells = rng.permutation(9)[: rng.integers(least, most + 1)]
    special = {}
    if rng.random() < 0.55:
        special[0] = _print_out("number", rng)
    if rng.random() < 0.55 and len(cells) > len(special):
        special[len(special)] = _print_out("word", rng)
    things: list[Thing] = []
    for index, cell in enumerate(cells):
        if index in special:
            kind, detail = special[index]
        elif rng.random() < more_print:
            kind, detail = _print_out(str(rng.choice(["number", "word"])), rng)
        elif things and things[-1].kind in SPRITES and rng.random() < 0.25:
            kind, detail = things[-1].kind, ""
        elif rng.random() < 0.22:
            kind, detail = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
        else:
            kind, detail = str(rng.choice(list(SPRITES))), ""
        printed = kind in ("number", "word")
        x, y = (np.array([cell % 3, cell // 3]) + 0.5 + rng.uniform(-0.24, 0.24, 2)) / 3
        things.append(
            Thing(
                kind,
                detail,
                int(cell),
                float(x),
                float(y),
                size=PRINT if printed else float(rng.uniform(0.24, 0.33)),
                angle=0.0 if printed else float(rng.uniform(-15, 15)),
                brightness=float(rng.uniform(0.8, 1.15)),
            )
        )
    return Scene(tuple(sorted(things, key=lambda thing: thing.cell)), int(rng.integers(2**31)))


def render(scene: Scene, size: int = SIZE) -> Image.Image:
    """Paint a scene as an RGB picture of `size` x `size` pixels."""
    picture = _background(np.random.default_rng(scene.background), size)
    for thing in _bottom_up(scene):
        stamp = _stamp(thing, size, _is_dark(picture, thing, size))
        picture.paste(stamp, _corner(thing, stamp, size), stamp)
    return picture


def coverage(scene: Scene) -> np.ndarray:
    """Which thing lies on each patch: `(12, 12)` indices into `scene.things`, -1 where there is none."""
    side = SIZE // PATCH
    owner = np.full((side, side), -1, np.int64)
    for thing in _bottom_up(scene):
        stamp = _stamp(thing, SIZE)
        layer = Image.new("L", (SIZE, SIZE))
        layer.paste(stamp.getchannel("A"), _corner(thing, stamp, SIZE))
        share = np.asarray(layer.reduce(PATCH), np.float32) / 255
        owner[share > (0.02 if thing.kind in ("number", "word") else 0.25)] = scene.things.index(thing)
    return owner


def facts(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str, str, str]]:
    """The questions that have one right answer in this scene, as `(kind, question, subject, answer)`.

    `subject` is what the question is about ("" where that is the whole picture).
    """
    names = [thing.name for thing in scene.things]
    kinds = [thing.kind for thing in scene.things]
    countable = [kind for kind in kinds if kind in SPRITES or kind in SHAPES]

    def ask(kind: str, subject: str, answer: str, shown: str | None = None) -> tuple[str, str, str, str]:
        template = ASK[kind][rng.integers(len(ASK[kind]))]
        return kind, template.format(subject if shown is None else shown), subject, answer

    for thing in scene.things:
        yield ask("what", thing.place, thing.name)
        if kinds.count(thing.kind) == 1:
            yield ask("where", thing.kind, thing.place)
        elif names.count(thing.name) == 1:
            yield ask("where", thing.name, thing.place)
        if thing.kind in SHAPES and kinds.count(thing.kind) == 1:
            yield ask("colour", thing.kind, thing.detail)
        if thing.kind in ("number", "word"):
            yield ask(thing.kind, "", thing.detail)
    empty = sorted(set(range(9)) - {thing.cell for thing in scene.things})
    yield ask("what", place(int(rng.choice(empty))), "nothing")
    for kind in dict.fromkeys(countable):
        yield ask("exists", kind, "yes", shown=_with_article(kind))
        other = _absent(kinds, rng)
        yield ask("exists", other, "no", shown=_with_article(other))
        yield ask("count", kind, str(kinds.count(kind)), shown=plural(kind))
    stranger = _absent(kinds, rng)
    yield ask("count", stranger, "0", shown=plural(stranger))
    yield ask("total", "", str(len(scene.things)))
    yield ask("describe", "", ", ".join(f"{thing.name} {thing.place}" for thing in scene.things))


def question(seed: int, kind: str) -> Question:
    """The first question of one kind that a picture from this seed, or the next that has any, allows."""
    rng = np.random.default_rng(seed)
    while True:
        scene = imagine(rng)
        found = [fact for fact in facts(scene, rng) if fact[0] == kind]
        if kind == "what" and len(found) > 1 and rng.random() < 0.9:
            found.pop()  # the last one is about an empty place
        if kind == "count":  # several of a kind are rare, and the interesting case
            several = [fact for fact in found if fact[3] > "1"]
            found = several or (found if rng.random() < 0.5 else [])
        if found:
            _, text, _, answer = found[rng.integers(len(found))]
            return Question(render(scene), text, answer, kind)


def _bottom_up(scene: Scene) -> list[Thing]:
    """Things in the order they are painted: print comes last, so that nothing covers it."""
    return sorted(scene.things, key=lambda thing: thing.kind in ("number", "word"))


def _print_out(kind: str, rng: np.random.Generator) -> tuple[str, str]:
    if kind == "word":
        return kind, str(rng.choice(WORDS))
    return kind, str(rng.integers(10, 1000 if rng.random() < 0.7 else 100))


def _absent(kinds: list[str], rng: np.random.Generator) -> str:
    while True:
        options = list(SPRITES) if rng.random() < 0.85 else list(SHAPES)
        kind = str(rng.choice(options))
        if kind not in kinds:
            return kind


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """Two colours blended along a random direction, with soft blotches or stripes and fine noise."""
    first, second = rng.uniform(30, 235, (2, 3)).astype(np.float32)
    if rng.random() < 0.6:
        second = first + rng.uniform(-50, 50, 3).astype(np.float32)
    turn = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    along = axis[None] * np.float32(np.cos(turn)) + axis[:, None] * np.float32(np.sin(turn))
    pixels = first + (along[..., None] + 0.5) * (second - first)
    strength = rng.uniform(0, 18)
    if rng.random() < 0.6:
        coarse = rng.integers(0, 256, (int(rng.integers(3, 14)),) * 2).astype(np.uint8)
        blotches = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        pixels += (np.asarray(blotches, np.float32) / 127.5 - 1)[..., None] * strength
    else:
        pixels += np.sin(along * rng.uniform(20, 90))[..., None] * strength
    grain = rng.integers(-1, 2, (SIZE, SIZE, 1)) * rng.uniform(0, 9)
    repeat = -(-size // SIZE)
    pixels += np.tile(grain, (repeat, repeat, 1))[:size, :size].astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@lru_cache(maxsize=1)
def _sprites() -> dict[str, Image.Image]:
    atlas = Image.open(ATLAS).convert("RGBA")
    corners = [(i % ATLAS_COLUMNS * SPRITE, i // ATLAS_COLUMNS * SPRITE) for i in range(len(SPRITES))]
    return {
        name: atlas.crop((left, top, left + SPRITE, top + SPRITE))
        for name, (left, top) in zip(SPRITES, corners, strict=True)
    }


@lru_cache(maxsize=256)
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(pixels)


def _corner(thing: Thing, stamp: Image.Image, size: int) -> tuple[int, int]:
    """Upper left corner that centres a stamp, pushed inside the picture where it would be cut off.

    Print lies on the raster of the patches, so that a model this small learns to read it in minutes.
    """
    step = size * PATCH // SIZE if thing.kind in ("number", "word") else 1
    left, top = (
        min(max(round((centre * size - side / 2) / step), 0), (size - side) // step) * step
        for centre, side in ((thing.x, stamp.width), (thing.y, stamp.height))
    )
    return left, top


@lru_cache(maxsize=32)
def _stamp(thing: Thing, size: int, on_dark: bool = False) -> Image.Image:
    """Paint one thing alone on a transparent ground."""
    pixels = max(round(thing.size * size), 8)
    if thing.kind in SPRITES:
        stamp = _sprites()[thing.kind].resize((pixels, pixels), Image.Resampling.BILINEAR)
        bands = stamp.split()
        lit = [band.point([min(255, round(v * thing.brightness)) for v in range(256)]) for band in bands[:3]]
        stamp = Image.merge("RGBA", [*lit, bands[3]])
    elif thing.kind in SHAPES:
        stamp = _shape(thing.kind, thing.detail, round(0.85 * pixels))
    else:
        return _print(thing.detail, pixels, size * PATCH // SIZE, on_dark)
    return stamp.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)


def _shape(kind: str, colour: str, pixels: int) -> Image.Image:
    scale = 3  # drawn large and reduced, for smooth edges
    end = pixels * scale
    stamp = Image.new("RGBA", (end, end), (*COLOURS[colour], 0))
    draw = ImageDraw.Draw(stamp)
    fill, line = (*COLOURS[colour], 255), (70, 70, 70, 255)
    inset = end // 12
    low, high, half = inset, end - inset, end // 2
    if kind == "circle":
        draw.ellipse((low, low, high, high), fill, line, scale)
    elif kind == "square":
        draw.rectangle((low, low, high, high), fill, line, scale)
    elif kind == "triangle":
        draw.polygon([(half, low), (high, high), (low, high)], fill, line, scale)
    else:
        draw.polygon([(half, 0), (end - 1, half), (half, end - 1), (0, half)], fill, line, scale)
    return stamp.reduce(scale)


def _print(text: str, pixels: int, raster: int, on_dark: bool) -> Image.Image:
    font = _font(pixels)
    stamp = Image.new("RGBA", (-int(-font.getlength(text) // raster) * raster, 2 * raster))
    ink, halo = ((255, 255, 255), (0, 0, 0)) if on_dark else ((10, 10, 10), (255, 255, 255))
    for alpha, colour, width in ((110, halo, 1), (255, ink, 0)):
        ImageDraw.Draw(stamp).text(
            (0, raster), text, (*colour, alpha), font, "lm", stroke_width=width, stroke_fill=(*colour, alpha)
        )
    return stamp


def _is_dark(picture: Image.Image, thing: Thing, size: int) -> bool:
    if thing.kind not in ("number", "word"):
        return False  # only print minds
    column, row = int(thing.x * size), int(thing.y * size)
    reach = max(size // 10, 1)
    around = picture.crop((max(column - reach, 0), max(row - reach // 2, 0), column + reach, row + reach // 2))
    return float(np.asarray(around.convert("L")).mean()) < 128
