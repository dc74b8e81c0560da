"""What the demo world's detector grants: to renderings with their own captions, and with captions that are wrong in one word.

    python -m benchmarks.detector [--scenes 500] [--detector FOLDER] [--seed 707] [--sweep]

Scenes are unseen ones whose captions name all that is there, with one, two and three objects. Layout is to hold for the
rendering's own caption (goal: 95 % of those with two objects), and not once a shape, a colour or a relation of it is
another one, or two objects have changed colours. --sweep prints the same for other thresholds of
infer/evaluation/demo/layout.py,
which were chosen by it.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

from extract.world import Scene, compose, render
from extract.world.grammar import Caption, Named, parse
from extract.world.vocabulary import COLOURS, INVERSE, SHAPES
from infer.evaluation.demo import layout
from infer.evaluation.demo.detector import Detector
from infer.evaluation.demo.layout import Found, judge
from infer.evaluation.demo.pixel_net import SHIPPED

PX = 64
SWEEP = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)


def scenes(seed: int) -> Iterator[Scene]:
    """Scenes of the plain world whose captions name everything."""
    for index in count():
        scene = compose(seed, index)
        if len(scene.mentioned) == len(scene.things):
            yield scene


# ---- captions that are wrong in one word -----------------------------------------------------------------------------


def other_shape(caption: Caption, rng: np.random.Generator) -> Caption | None:
    return _renamed(caption, rng, lambda one: replace(one, shape=_other(SHAPES, one.shape, rng)))


def other_colour(caption: Caption, rng: np.random.Generator) -> Caption | None:
    """A colour that none of its objects has."""
    free = [name for name in COLOURS if name not in {one.colour for one in caption.objects}]
    return _renamed(caption, rng, lambda one: replace(one, colour=free[rng.integers(len(free))]))


def colours_changed(caption: Caption, rng: np.random.Generator) -> Caption | None:
    """The first two objects have each other's colour."""
    if len(caption.objects) < 2:
        return None
    a, b, *rest = caption.objects
    return replace(caption, objects=(replace(a, colour=b.colour), replace(b, colour=a.colour), *rest))


def other_relation(caption: Caption, rng: np.random.Generator) -> Caption | None:
    """The first relation is its inverse; "on top of" is "behind"."""
    if not caption.relations:
        return None
    first, *rest = caption.relations
    wrong = replace(first, relation=INVERSE.get(first.relation, "behind"))
    return replace(caption, relations=(wrong, *rest))


def _renamed(caption: Caption, rng: np.random.Generator, rename: Callable[[Named], Named]) -> Caption:
    at = int(rng.integers(len(caption.objects)))
    return replace(caption, objects=(*caption.objects[:at], rename(caption.objects[at]), *caption.objects[at + 1 :]))


def _other(names: tuple[str, ...], name: str, rng: np.random.Generator) -> str:
    others = [other for other in names if other != name]
    return others[rng.integers(len(others))]


WRONG = {
    "another shape": other_shape,
    "another colour": other_colour,
    "colours changed": colours_changed,
    "another relation": other_relation,
}


# ---- the table -------------------------------------------------------------------------------------------------------


def shares(captions: list[Caption], found: list[list[Found]]) -> dict[str, list[str]]:
    """Row -> per cent of layouts that hold, for captions of one, two and three objects."""
    rows: dict[str, list[str]] = {"its own caption": []} | {name: [] for name in WRONG}
    for number in (1, 2, 3):
        own = [(c, f) for c, f in zip(captions, found, strict=True) if len(c.objects) == number]
        rows["its own caption"].append(_percent([judge(c, f).layout for c, f in own]))
        for name, change in WRONG.items():
            rng = np.random.default_rng(number)
            changed = [(change(c, rng), f) for c, f in own]
            rows[name].append(_percent([judge(c, f).layout for c, f in changed if c is not None]))
    return rows


def _percent(passed: list[bool]) -> str:
    return f"{100 * np.mean(passed):.1f} % of {len(passed)}" if passed else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=707)
    parser.add_argument("--detector", type=Path, default=SHIPPED)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    chosen = [scene for scene, _ in zip(scenes(options.seed), range(options.scenes), strict=False)]
    captions = [parse(scene.caption) for scene in chosen]
    detector = Detector.load(options.detector)
    found = [objects for _, objects in detector([render(scene, PX).image for scene in chosen])]
    thresholds = [(layout.SHAPE, layout.COLOUR, layout.RELATION)]
    if options.sweep:
        thresholds += [(value, value, layout.RELATION) for value in SWEEP]
        thresholds += [(layout.SHAPE, layout.COLOUR, value) for value in SWEEP]
    for shape, colour, relation in thresholds:
        with mock.patch.multiple(layout, SHAPE=shape, COLOUR=colour, RELATION=relation):
            rows = shares(captions, found)
        title = f"shape from {shape}, colour from {colour}, relation from {relation} on"
        table = Table("layout holds", "1 object", "2 objects", "3 objects", title=title)
        for name, cells in rows.items():
            table.add_row(name, *cells)
        Console().print(table)


if __name__ == "__main__":
    main()
