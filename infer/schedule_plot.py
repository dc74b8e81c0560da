"""The schedules as a picture: for each, a grid of stages (down) by timesteps (across), darker where the image listens more.

Plain shapes and words, drawn as SVG text or with Pillow: no plotting library needed.

    python -m infer.schedule_plot docs/schedules.svg        the figure of docs/method.md
"""

import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont

from infer.model.schedules import Schedule
from infer.model.stages import stage_maps
from shards.core.errors import UserError

WIDTH, LEFT, RIGHT, CELL = 760, 64, 96, 4  # pixels: the picture, its margins, one timestep cell's width
PAPER, INK = (255, 255, 255), (34, 34, 34)
NONE, FULL = (244, 246, 249), (16, 78, 139)  # w = 0 and w >= 1

Colour = tuple[int, int, int]


class Box(NamedTuple):
    x: float
    y: float
    w: float
    h: float
    fill: Colour


class Word(NamedTuple):
    x: float
    y: float  # baseline
    text: str
    size: int
    anchor: str  # "l", "m" or "r"


def plot_schedules(
    schedules: Mapping[str, Schedule], stages: int, path: str | Path, steps: Sequence[float] = ()
) -> None:
    """Draw the schedules (title -> schedule) over stages 1..stages into an .svg or .png file.

    steps: timesteps to mark below each grid, such as a sampler's. UserError for another kind of file.
    """
    path = Path(path)
    shapes, height = layout(schedules, stages, steps)
    if path.suffix == ".svg":
        path.write_text(_svg(shapes, height), encoding="utf-8")
    elif path.suffix == ".png":
        _png(shapes, height).save(path)
    else:
        raise UserError(f"a schedule cannot be drawn to {path}: give a file that ends in .svg or .png.")


def plot_defaults(path: str | Path) -> None:
    """SD 2.1's two schedules with the paper's numbers, and the steps of a 25-step run."""
    sd = stage_maps()["unet4"]
    titles = {
        "drop": "Drop (eq. 2): tau = 900, L = {3, 4, 5, 6, 7}",
        "gaussian": "Gaussian (eq. 3): alpha = 1, tau = 800, sigma = 100",
    }
    steps = [float(t) for t in range(961, 0, -40)]
    plot_schedules({title: sd.schedule(name) for name, title in titles.items()}, sd.stages, path, steps)


def layout(schedules: Mapping[str, Schedule], stages: int, steps: Sequence[float]) -> tuple[list[Box | Word], int]:
    """The picture as shapes, and its height in pixels."""
    shapes: list[Box | Word] = []
    cells = (WIDTH - LEFT - RIGHT) // CELL
    span = cells * CELL
    row = 16 if stages <= 12 else 9
    y = 12
    for title, schedule in schedules.items():
        shapes.append(Word(LEFT, y + 14, title, 15, "l"))
        y += 24
        times = [1000 * (1 - (i + 0.5) / cells) for i in range(cells)]
        weights = [schedule.at(t, stages) for t in times]
        for stage in range(1, stages + 1):
            if stages <= 12 or stage % 4 == 1:
                shapes.append(Word(LEFT - 8, y + row - 4 + (row < 12), str(stage), 11, "r"))
            x: float = LEFT
            for colour, run in groupby(_colour(column[stage - 1]) for column in weights):
                width = CELL * len(list(run))
                shapes.append(Box(x, y, width, row - 1, colour))
                x += width
            y += row
        shapes.append(Word(14, y - stages * row / 2 + 4, "stage", 11, "l"))
        for t in steps:
            shapes.append(Box(LEFT + span * (1 - t / 1000) - 0.5, y + 1, 1, 4, INK))
        for t in range(1000, -1, -200):
            x = LEFT + span * (1 - t / 1000)
            shapes += [Box(x - 0.5, y + 2, 1, 5, INK), Word(x, y + 19, str(t), 11, "m")]
        y += 34
    shapes.append(Word(LEFT + span / 2, y + 4, "timestep: sampling runs from noise (1000) to the image (0)", 11, "m"))
    for i, w in enumerate((1.0, 0.75, 0.5, 0.25, 0.0)):
        shapes += [
            Box(WIDTH - 78, 38 + 16 * i, 22, 15, _colour(w)),
            Word(WIDTH - 50, 50 + 16 * i, f"w = {w:g}", 11, "l"),
        ]
    return shapes, y + 16


def _colour(w: float) -> Colour:
    """A ramp between two colours in 64 steps."""
    mix = round(min(w, 1.0) * 63) / 63
    red, green, blue = (round(a + mix * (b - a)) for a, b in zip(NONE, FULL, strict=True))
    return red, green, blue


def _svg(shapes: Sequence[Box | Word], height: int) -> str:
    anchors = {"l": "start", "m": "middle", "r": "end"}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="Helvetica, Arial, sans-serif" fill="#{bytes(INK).hex()}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#{bytes(PAPER).hex()}"/>',
    ]
    for s in shapes:
        if isinstance(s, Box):
            lines.append(
                f'<rect x="{s.x:g}" y="{s.y:g}" width="{s.w:g}" height="{s.h:g}" fill="#{bytes(s.fill).hex()}"/>'
            )
        else:
            place = f'x="{s.x:g}" y="{s.y:g}" font-size="{s.size}" text-anchor="{anchors[s.anchor]}"'
            lines.append(f"<text {place}>{escape(s.text)}</text>")
    return "\n".join([*lines, "</svg>", ""])


def _png(shapes: Sequence[Box | Word], height: int, scale: int = 2) -> Image.Image:
    image = Image.new("RGB", (WIDTH * scale, height * scale), PAPER)
    draw = ImageDraw.Draw(image)
    for s in shapes:
        if isinstance(s, Box):
            corners = [s.x * scale, s.y * scale, (s.x + s.w) * scale - 1, (s.y + s.h) * scale - 1]
            draw.rectangle([round(c) for c in corners], fill=s.fill)
        else:
            font = ImageFont.load_default(s.size * scale)
            draw.text((s.x * scale, s.y * scale), s.text, INK, font, anchor=s.anchor + "s")
    return image


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m infer.schedule_plot FILE.svg|FILE.png")
    plot_defaults(sys.argv[1])
