"""Draw the sprites of glimpse's world, once, from the Noto Color Emoji font.

    python training/make_atlas.py /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

The atlas ships with the package, so the world can be drawn where the font is not installed.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from foveate.glimpse.world import ATLAS, ATLAS_COLUMNS, SPRITE, SPRITES

STRIKE = 109  # the one size, in pixels, at which the font holds bitmaps


def main() -> None:
    font = ImageFont.truetype(sys.argv[1], STRIKE)
    rows = -(-len(SPRITES) // ATLAS_COLUMNS)
    atlas = Image.new("RGBA", (ATLAS_COLUMNS * SPRITE, rows * SPRITE))
    for index, (name, emoji) in enumerate(SPRITES.items()):
        canvas = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE))
        ImageDraw.Draw(canvas).text((STRIKE // 2, STRIKE // 2), emoji, font=font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise SystemExit(f"the font has no picture of {name} ({emoji})")
        sprite = canvas.crop(box)
        sprite.thumbnail((SPRITE, SPRITE), Image.Resampling.LANCZOS)
        left = index % ATLAS_COLUMNS * SPRITE + (SPRITE - sprite.width) // 2
        top = index // ATLAS_COLUMNS * SPRITE + (SPRITE - sprite.height) // 2
        atlas.paste(sprite, (left, top))
    atlas.save(ATLAS, optimize=True)
    print(f"{ATLAS}: {len(SPRITES)} sprites, {Path(ATLAS).stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
