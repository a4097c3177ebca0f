"""Draws what examples/ shows of glimpse's world, finer than the models see it: demo.png, and a clip as frames and film.

python training/make_demo.py
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
from PIL.Image import Image

from foveate.glimpse.clips import SIZE, Clip, Track
from foveate.glimpse.drawing import render
from foveate.glimpse.scene import PRINT, Scene, Thing

THINGS = (
    Thing("dog", "", 0, 0.19, 0.18, 0.30, -6, 1.0),
    Thing("sunflower", "", 2, 0.82, 0.17, 0.28, 8, 1.0),
    Thing("word", "park", 3, 0.17, 0.50, PRINT, 0, 1.0),
    Thing("circle", "red", 4, 0.51, 0.49, 0.28, 0, 1.0),
    Thing("owl", "", 6, 0.18, 0.82, 0.29, 0, 1.0),
    Thing("bicycle", "", 8, 0.81, 0.83, 0.32, 4, 1.0),
)
ROCKET = Thing("rocket", "", 3, 0.18, 0.51, 0.34, 0, 1.0)
CIRCLE = Thing("circle", "red", 2, 0.82, 0.17, 0.33, 0, 1.0)
HOUSE = Thing("house", "", 4, 0.50, 0.48, 0.34, 0, 1.0)
DOG = Thing("dog", "", 6, 0.18, 0.82, 0.34, 0, 1.0)
TURNED, RISEN = replace(CIRCLE, detail="blue"), replace(ROCKET, cell=0, y=ROCKET.y - 1 / 3)
HALFWAY, ACROSS = (replace(DOG, cell=6 + step, x=DOG.x + step / 3) for step in (1, 2))
CLIP = Clip(
    (
        Track((CIRCLE, CIRCLE, CIRCLE, TURNED, TURNED, TURNED)),
        Track((ROCKET, RISEN, RISEN, RISEN, RISEN, RISEN)),
        Track((None, None, None, None, HOUSE, HOUSE)),
        Track((DOG, DOG, HALFWAY, ACROSS, ACROSS, ACROSS)),
    ),
    background=33,
)

FPS = 2  # of the film: three seconds


def film(pictures: Sequence[Image], path: Path) -> None:
    """Write pictures as a film of FPS frames a second."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS, options={"crf": "18", "threads": "1"})
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            out.mux(stream.encode(av.VideoFrame.from_image(picture)))
        out.mux(stream.encode())


if __name__ == "__main__":
    folder = Path(__file__).parents[1] / "examples"
    (folder / "clip").mkdir(parents=True, exist_ok=True)
    render(Scene(THINGS, background=30), 504).save(folder / "demo.png", optimize=True)
    for number, picture in enumerate(CLIP.pictures(2 * SIZE), start=1):
        picture.save(folder / "clip" / f"{number}.png", optimize=True)
    film(CLIP.pictures(2 * SIZE), folder / "clip.mp4")
