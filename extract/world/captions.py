"""Captions: which relations hold visibly in a picture, and the small grammar that states some of them.

caption  = [there is] subject [place]
subject  = NAME | NAME RELATION NAME | NAME RELATION NAME and RELATION NAME | NAME and NAME
NAME     = a|an [material] [colour] shape
place    = [on FLOOR] [in front of WALL | under SKY]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from extract.world.scene import Relation, Thing
from extract.world.vocabulary import FLOORS, INVERSE, MATERIALS, SKIES, STANDS_ON, WALLS

MARGIN = 0.10
"""Centroids of things left and right of each other are further apart than this share of the picture's width."""
DEPTH_MARGIN_M = 0.25
"""Things behind each other are further apart in depth than this, and than half of their sizes together."""


@dataclass(frozen=True)
class Sight:
    """What a thing looks like in the picture: 0..1 of its sides; depth_m of its middle, radius_m of its footprint."""

    x: float
    left: float
    right: float
    depth_m: float
    radius_m: float


def relations(things: Sequence[Thing], sights: Sequence[Sight]) -> list[Relation]:
    """All relations between visible things that a viewer would agree with; first what each thing stands on."""
    found = [
        Relation(i, "on top of" if t.supported_by >= 0 else STANDS_ON, t.supported_by) for i, t in enumerate(things)
    ]
    for i, a in enumerate(sights):
        for j, b in enumerate(sights):
            if i == j or things[i].supported_by == j or things[j].supported_by == i:
                continue
            if b.x - a.x > MARGIN and a.right < b.x and a.x < b.left:
                found += [Relation(i, "left of", j), Relation(j, INVERSE["left of"], i)]
            on_floor = things[i].supported_by < 0 and things[j].supported_by < 0
            overlap = min(a.right, b.right) - max(a.left, b.left)
            aligned = overlap > 0.4 * min(a.right - a.left, b.right - b.left)
            apart = a.depth_m - b.depth_m > max(DEPTH_MARGIN_M, 0.9 * (a.radius_m + b.radius_m))
            if on_floor and aligned and apart:
                found += [Relation(i, "behind", j), Relation(j, INVERSE["behind"], i)]
    return found


def name(thing: Thing) -> str:
    """A thing with its article, e.g. "an orange cube", "a shiny red sphere"."""
    words = [MATERIALS[thing.material].word, thing.colour, thing.shape] if thing.hue_matters else [thing.shape]
    text = " ".join(word for word in words if word)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def write(
    things: Sequence[Thing],
    true: Sequence[Relation],
    place: str,
    rng: np.random.Generator,
) -> tuple[str, tuple[int, ...]]:
    """A caption and the indices of the things that it names."""
    between = [r for r in true if r.object >= 0]
    stacked = [r for r in between if r.relation == "on top of"]
    if between and rng.random() < 0.9:
        kinds = sorted(
            {r.relation for r in between}
        )  # each relation as often as the others, not as its number of pairs
        kind = "on top of" if stacked and rng.random() < 0.5 else kinds[rng.integers(len(kinds))]
        pool = [r for r in between if r.relation == kind]
        first = pool[rng.integers(len(pool))]
        text, named = (
            f"{name(things[first.subject])} {first.relation} {name(things[first.object])}",
            [first.subject, first.object],
        )
        more = [
            r
            for r in between
            if r.subject == first.subject and r.object != first.object and r.relation != first.relation
        ]
        if more and rng.random() < 0.5:
            second = more[rng.integers(len(more))]
            text, named = f"{text} and {second.relation} {name(things[second.object])}", [*named, second.object]
    elif len(things) > 1 and rng.random() < 0.7:
        named = [int(i) for i in rng.permutation(len(things))[:2]]
        text = f"{name(things[named[0]])} and {name(things[named[1]])}"
    else:
        named = [int(rng.integers(len(things)))]
        text = name(things[named[0]])
        if rng.random() < 0.3:
            text = f"there is {text}"
    return f"{text} {place}".strip(), tuple(named)


def place(floor: str, wall: str, paint: str, sky: str, rng: np.random.Generator) -> str:
    """Where it is: the floor nearly always, the wall or the sky half of the time. Empty names are left out."""
    parts = []
    if floor and rng.random() < 0.9:
        parts.append(f"on {FLOORS[floor].phrase}")
    if wall and rng.random() < 0.5:
        parts.append(f"in front of {_with_article(WALLS[wall].phrase.format(colour=paint))}")
    elif sky and rng.random() < 0.5:
        parts.append(f"under {SKIES[sky].phrase}")
    return " ".join(parts)


def _with_article(phrase: str) -> str:
    return f"an {phrase[2:]}" if phrase[2] in "aeiou" else phrase
