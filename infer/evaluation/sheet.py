"""A picture to look at: a row for each caption, a column for each method, and the maps of one of them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Grid = Sequence[tuple[str, Sequence[np.ndarray]]]
"""Rows of (caption, pictures uint8 RGB (H, W, 3), one for each column)."""

_PAPER, _INK, _MUTED = (250, 250, 249), (28, 27, 25), (120, 118, 114)
GAP = 4


def grid(columns: Sequence[str], rows: Grid, side_px: int = 128) -> Image.Image:
    """All pictures at side_px (small ones enlarged without smoothing), captions under their rows."""
    font = ImageFont.load_default(size=12)
    line_px = 18
    width = GAP + len(columns) * (side_px + GAP)
    canvas = Image.new("RGB", (width, line_px + len(rows) * (side_px + line_px + GAP) + GAP), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(columns):
        draw.text((GAP + column * (side_px + GAP), 2), name[: side_px // 7], _MUTED, font)
    y = line_px
    for caption, pictures in rows:
        for column, picture in enumerate(pictures):
            shown = Image.fromarray(np.ascontiguousarray(picture))
            how = Image.Resampling.NEAREST if max(shown.size) <= side_px else Image.Resampling.LANCZOS
            canvas.paste(shown.resize((side_px, side_px), how), (GAP + column * (side_px + GAP), y))
        draw.text((GAP, y + side_px + 1), caption, _INK, font)
        y += side_px + line_px + GAP
    return canvas
