"""What is in a picture, by the detector, and whether it is what the caption says: objects, colours, relations.

An object is a connected region of one colour; its shape is what most of it looks like. Relations are those of
extract/world/captions.py, judged from what can be seen: the thresholds are a little wider than there, because a caption
is written only where a relation is clear, and narrower than what would let an inverted caption pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from extract.world.captions import MARGIN
from extract.world.vocabulary import INVERSE, SHAPES
from infer.evaluation.detector import COLOUR_CLASSES, PLACES, Seen
from infer.evaluation.grammar import Caption, Named

SMALLEST = 0.005
"""Share of the picture below which a region is no object; captions name nothing below twice this."""
SLACK = 0.03
"""Of the picture's width, by which outlines may be off."""
OVERLAP = 0.3
"""Share of the narrower one's width that things in a row of depth have in common, at least."""
FARTHER = 1.08
"""Ratio of depths from which on one thing is behind another."""
CONTACT = 0.6
"""Share of a thing's columns under which there is what it stands on, at least."""
STACKED = 1.15
"""Ratio of depths up to which one thing can stand on another."""


@dataclass(frozen=True, eq=False)
class Found:
    """One object of a picture. mask: bool (h, w). x, left, right, top, bottom: 0..1 of the sides. sure: the mean
    probability of its shape. depth_m: its median distance."""

    shape: str
    colour: str
    mask: np.ndarray
    sure: float
    depth_m: float

    @property
    def share(self) -> float:
        return float(self.mask.mean())

    @property
    def x(self) -> float:
        columns = np.flatnonzero(self.mask) % self.mask.shape[1]
        return float(columns.mean() + 0.5) / self.mask.shape[1]

    @property
    def left(self) -> float:
        return int(self.mask.any(axis=0).argmax()) / self.mask.shape[1]

    @property
    def right(self) -> float:
        return (1 + int(np.flatnonzero(self.mask.any(axis=0))[-1])) / self.mask.shape[1]

    @property
    def bottom(self) -> float:
        return (1 + int(np.flatnonzero(self.mask.any(axis=1))[-1])) / self.mask.shape[0]


def find_objects(seen: Seen) -> list[Found]:
    """The objects of a picture, largest first."""
    places = len(PLACES)
    thing = seen.shape[:places].sum(axis=0) < 0.5
    colour = np.where(thing, seen.colour[1:].argmax(axis=0) + 1, 0)
    found = []
    for code in np.unique(colour[colour > 0]):
        mask = (colour == code).astype(np.uint8)
        # legs of chairs and the two sides of a thin thing in front are a pixel apart
        count, joined = cv2.connectedComponents(cv2.dilate(mask, np.ones((3, 3), np.uint8)), connectivity=8)
        for number in range(1, count):
            here = (joined == number) & (mask > 0)
            if here.mean() < SMALLEST:
                continue
            likely = seen.shape[places:, here].mean(axis=1)
            found.append(
                Found(
                    shape=SHAPES[int(likely.argmax())],
                    colour=COLOUR_CLASSES[code],
                    mask=here,
                    sure=float(likely.max()),
                    depth_m=float(np.median(seen.depth_m[here])),
                )
            )
    return sorted(found, key=lambda one: -one.share)


def find_segments(seen: Seen, ids: np.ndarray) -> list[Found]:
    """The segments, int (h, w), that are things for the most part; as find_objects gives them."""
    thing = seen.shape[: len(PLACES)].sum(axis=0) < 0.5
    found = []
    for number in np.unique(ids):
        here = ids == number
        if here.mean() < SMALLEST or thing[here].mean() < 0.5:
            continue
        shapes, colours = seen.shape[len(PLACES) :, here].mean(axis=1), seen.colour[1:, here].mean(axis=1)
        shape, colour = SHAPES[int(shapes.argmax())], COLOUR_CLASSES[1 + int(colours.argmax())]
        found.append(Found(shape, colour, here, float(shapes.max()), float(np.median(seen.depth_m[here]))))
    return found


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows its caption. objects: all are there, in shape and colour; colours: in colour at least;
    once: each is there exactly once; relations: (name, holds) for each that is stated (False without its objects)."""

    objects: bool
    colours: bool
    once: bool
    relations: tuple[tuple[str, bool], ...]

    @property
    def layout(self) -> bool:
        """All objects are there and all relations hold."""
        return self.objects and all(holds for _, holds in self.relations)


def judge(caption: Caption, found: Sequence[Found]) -> Verdict:
    """The verdict on a picture in which these objects were found. With several of a kind, any may be the one that is meant."""
    meant = [[one for one in found if _is(one, named)] for named in caption.objects]
    relations = tuple(
        (
            stated.relation,
            any(holds(stated.relation, a, b) for a in meant[stated.subject] for b in meant[stated.object]),
        )
        for stated in caption.relations
    )
    colours = all(any(one.colour == named.colour for one in found) for named in caption.objects if named.colour)
    return Verdict(
        objects=all(meant), colours=colours, once=all(len(group) == 1 for group in meant), relations=relations
    )


def _is(one: Found, named: Named) -> bool:
    return one.shape == named.shape and named.colour in ("", one.colour)


def holds(relation: str, a: Found, b: Found) -> bool:
    """Whether `a` is `relation` `b`, as a viewer of the picture would say."""
    if relation in ("right of", "in front of"):
        return holds(INVERSE[relation], b, a)
    if relation == "left of":
        apart = b.x - a.x > MARGIN - SLACK
        return apart and a.right < b.x + SLACK and a.x < b.left + SLACK
    if relation == "behind":
        overlap = min(a.right, b.right) - max(a.left, b.left)
        aligned = overlap > OVERLAP * min(a.right - a.left, b.right - b.left)
        return aligned and a.bottom < b.bottom and a.depth_m > FARTHER * b.depth_m
    if relation == "on top of":
        ratio = max(a.depth_m / b.depth_m, b.depth_m / a.depth_m)
        return contact(a.mask, b.mask) >= CONTACT and ratio < STACKED and a.bottom < b.bottom
    raise ValueError(f"{relation!r} is not a relation of captions")


def contact(above: np.ndarray, below: np.ndarray, reach_px: int = 3) -> float:
    """Share of the columns of `above` in which a pixel of `below` lies at most reach_px under its lowest one."""
    height = above.shape[0]
    columns = np.flatnonzero(above.any(axis=0))
    lowest = height - 1 - above[::-1].argmax(axis=0)[columns]
    touched = np.zeros(len(columns), bool)
    for step in range(1, reach_px + 1):
        touched |= below[np.minimum(lowest + step, height - 1), columns]
    return float(touched.mean())
