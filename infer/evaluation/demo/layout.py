"""What is in a picture, by the detector, and whether it is what the caption says: objects, colours, relations.

An object is a connected region of one colour, or a segment; its shape and colour are what it most looks like. A caption's
word is granted to it as soon as it is not unlikely (SHAPE, COLOUR): of a thing of eight pixels nobody can tell a cone from a
pyramid, and a picture is not wrong for that. Relations are those of extract/world/captions.py: left and right by the
outlines, a little wider than there, because a caption is written only where a relation is clear; the others are granted as
soon as a close look finds them not unlikely (RELATION). What all this grants to right and to wrong captions is measured by
benchmarks/detector.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import cv2
import numpy as np

from extract.world.captions import MARGIN
from extract.world.grammar import Caption, Named
from extract.world.vocabulary import COLOURS, SHAPES
from infer.evaluation.demo.pixel_net import PLACES, Seen

SHAPE, COLOUR, RELATION = 0.05, 0.05, 0.1
"""Probability from which on a thing may be called by a shape, and by a colour, and said to be behind or on top of another."""
SMALLEST = 0.005
"""Share of the picture below which a region is no object; captions name nothing below twice this."""
SLACK = 0.03
"""Of the picture's width, by which outlines may be off."""
PART = 0.5
"""Probability of its name from which on a part is joined to another one of that name."""
RELATED = ("", "behind", "in front of", "on top of", "under")
"""What a close look says of two things: what the first is to the second, if it is anything."""


@dataclass(frozen=True, eq=False)
class Found:
    """One object of a picture. mask: bool (h, w). shapes (9,), colours (12,): probabilities of its names. depth_m: its
    median distance. number: its place among the picture's objects; related (n, 5): the probabilities of what it is to each
    of them. x, left, right, top, bottom: 0..1 of the sides."""

    mask: np.ndarray
    shapes: np.ndarray
    colours: np.ndarray
    depth_m: float
    number: int = 0
    related: np.ndarray = field(default_factory=lambda: np.zeros((0, len(RELATED)), np.float32))

    @property
    def shape(self) -> str:
        return SHAPES[int(self.shapes.argmax())]

    @property
    def colour(self) -> str:
        return tuple(COLOURS)[int(self.colours.argmax())]

    @property
    def sure(self) -> float:
        """The probability of its shape and colour together."""
        return float(self.shapes.max() * self.colours.max())

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
            found.append(_as_it_looks(seen, here))
    return sorted(found, key=lambda one: -one.share)


def find_segments(seen: Seen, ids: np.ndarray) -> list[Found]:
    """The segments, int (h, w), that are things for the most part; as find_objects gives them."""
    thing = seen.shape[: len(PLACES)].sum(axis=0) < 0.5
    masks = [ids == number for number in np.unique(ids)]
    return [_as_it_looks(seen, here) for here in masks if here.mean() >= SMALLEST and thing[here].mean() >= 0.5]


def _as_it_looks(seen: Seen, here: np.ndarray) -> Found:
    """The object of a mask, named by its pixels."""
    shapes, colours = seen.shape[len(PLACES) :, here].mean(axis=1), seen.colour[1:, here].mean(axis=1)
    return Found(here, shapes, colours, float(np.median(seen.depth_m[here])))


def joined(found: Sequence[Found]) -> list[Found]:
    """Parts of one name that touch, such as the roof and the walls of a house, as one, named as the surest; largest first."""
    groups: list[list[Found]] = []
    for one in found:
        around = cv2.dilate(one.mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        mine = [group for group in groups if any(_is_part(one, around, other) for other in group)]
        groups = [group for group in groups if group not in mine] + [[one, *(part for group in mine for part in group)]]
    wholes = []
    for group in groups:
        clearest = max(group, key=lambda part: part.sure)
        wholes.append(replace(clearest, mask=np.logical_or.reduce([part.mask for part in group])))
    return sorted(wholes, key=lambda one: -one.share)


def _is_part(one: Found, around: np.ndarray, other: Found) -> bool:
    likely = min(one.sure, other.sure) > PART and (one.shape, one.colour) == (other.shape, other.colour)
    return likely and bool((around & other.mask).any())


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows its caption. objects: all are there, in shape and colour; colours: in colour at least;
    once: and none of them surely twice; relations: (name, holds) for each that is stated (False without its objects)."""

    objects: bool
    colours: bool
    once: bool
    relations: tuple[tuple[str, bool], ...]

    @property
    def layout(self) -> bool:
        """All objects are there and all relations hold."""
        return self.objects and all(holds for _, holds in self.relations)


def judge(caption: Caption, found: Sequence[Found]) -> Verdict:
    """The verdict on a picture in which these objects were found: the best of all ways to find the caption's things in it."""
    meant = [[one for one in found if may_be(one, named)] for named in caption.objects]
    ways = [way for way in product(*meant) if len({id(one) for one in way}) == len(way)]
    verdicts = [[holds(r.relation, way[r.subject], way[r.object]) for r in caption.relations] for way in ways]
    best = max(verdicts, key=sum, default=[False] * len(caption.relations))
    wholes = joined(found)
    colours = all(any(_looks(one, named.colour) for one in found) for named in caption.objects if named.colour)
    return Verdict(
        objects=bool(ways),
        colours=colours,
        once=bool(ways) and all(sum(is_likely(one, named) for one in wholes) <= 1 for named in caption.objects),
        relations=tuple(zip((stated.relation for stated in caption.relations), best, strict=True)),
    )


def may_be(one: Found, named: Named) -> bool:
    """Whether an object can be called by this name."""
    return bool(one.shapes[SHAPES.index(named.shape)] >= SHAPE) and _looks(one, named.colour)


def is_likely(one: Found, named: Named) -> bool:
    """Whether an object is more likely this than not."""
    colour = one.colours[list(COLOURS).index(named.colour)] if named.colour else 1.0
    return bool(one.shapes[SHAPES.index(named.shape)] * colour > 0.5)


def _looks(one: Found, colour: str) -> bool:
    return not colour or bool(one.colours[list(COLOURS).index(colour)] >= COLOUR)


def holds(relation: str, a: Found, b: Found) -> bool:
    """Whether `a` is `relation` `b`, two objects of one picture, as a viewer would say."""
    if relation == "right of":
        return holds("left of", b, a)
    if relation == "left of":
        apart = b.x - a.x > MARGIN - SLACK
        return apart and a.right < b.x + SLACK and a.x < b.left + SLACK
    return bool(a.related[b.number, RELATED.index(relation)] >= RELATION)
