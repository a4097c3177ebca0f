"""Draws examples/demo.png: a picture from glimpse's world, three times as fine as the model sees it.

python training/make_demo.py
"""

from pathlib import Path

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

if __name__ == "__main__":
    folder = Path(__file__).parents[1] / "examples"
    folder.mkdir(exist_ok=True)
    render(Scene(THINGS, background=30), 504).save(folder / "demo.png", optimize=True)
