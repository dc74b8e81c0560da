"""Captions of the demo world: true of the picture, and of its own vocabulary."""

import re

import cv2
import numpy as np
import pytest

from extract.world import Rendering, Scene, compose, render
from extract.world import captions as grammar
from extract.world.tracing import View, nearest
from extract.world.vocabulary import (
    COLOURS,
    FLOORS,
    INVERSE,
    MATERIALS,
    RELATIONS,
    SHAPES,
    SKIES,
    STANDS_ON,
    WALLS,
    words,
)

_NAME = r"an? (?:(?P<material>{m}) )?(?P<colour>{c}) (?P<shape>{s})".format(
    m="|".join(m.word for m in MATERIALS.values() if m.word), c="|".join(COLOURS), s="|".join(SHAPES)
)


def _parse(caption: str) -> tuple[list[str], list[tuple[int, str, int]], str]:
    """The names in a caption, its relations between them (by their order in it), and the rest of it."""
    names = [match.group() for match in re.finditer(_NAME, caption)]
    text = caption
    for number, name in enumerate(names):
        text = text.replace(name, f"<{number}>", 1)
    relation = "|".join(RELATIONS)
    body = re.match(rf"(?:there is )?<0>(?: ({relation}) <(\d)>)?(?: and (?:({relation}) )?<(\d)>)?", text)
    assert body, caption
    found = [(0, body[n], int(body[n + 1])) for n in (1, 3) if body[n]]
    return names, found, text[body.end() :].strip()


def test_captions_are_true_of_the_maps() -> None:
    counts = dict.fromkeys(RELATIONS, 0)
    for index in range(300):
        scene = compose(8, index)
        r = render(scene, 96)
        names, related, place = _parse(r.caption)
        masks = [_find(r, name) for name in names]
        for a, relation, b in related:
            counts[relation] += 1
            _check(r, masks[a], relation, masks[b], f"scene {index}: {r.caption}")
        _check_place(scene, r, place)
    assert min(counts.values()) > 10, counts


def _find(r: Rendering, name: str) -> np.ndarray:
    """The mask of the only object of the picture with this name; it must fill at least 0.7 % of it."""
    words = re.fullmatch(_NAME, name)
    assert words
    same = [o for o in r.objects if (o["colour"], o["shape"]) == (words["colour"], words["shape"])]
    assert len(same) == 1 and same[0]["mentioned"], name
    assert (MATERIALS[same[0]["material"]].word or None) == words["material"]
    mask = r.segmentation == same[0]["segment"]
    assert mask.mean() == pytest.approx(same[0]["share"], abs=1e-5)
    assert mask.mean() > 0.007
    return mask


def _check(r: Rendering, a: np.ndarray, relation: str, b: np.ndarray, what: str) -> None:
    if relation in ("right of", "in front of"):
        a, b, relation = b, a, INVERSE[relation]
    (ay, ax), (by, bx) = np.nonzero(a), np.nonzero(b)
    if relation == "left of":
        assert bx.mean() - ax.mean() > 0.07 * 96, what
        assert np.median(ax) < bx.min() + 2 and ax.max() - 2 < np.median(bx), what
    elif relation == "behind":
        assert np.median(r.depth_m[a]) - np.median(r.depth_m[b]) > 0.1, what
        assert min(ax.max(), bx.max()) > max(ax.min(), bx.min()), what
    else:
        assert relation == "on top of"
        assert ay.mean() < by.mean() and bx.min() - 2 <= ax.mean() <= bx.max() + 2, what
        touching = cv2.dilate(a.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool) & b
        assert touching.any(), what
        gap = abs(float(np.median(r.depth_m[a])) - float(np.median(r.depth_m[b])))
        assert gap < 1.5, what


def _check_place(scene: Scene, r: Rendering, place: str) -> None:
    labels = np.array(["", *r.segments])[r.segmentation]
    rest = place
    for floor, ground in FLOORS.items():
        if rest.startswith(f"on {ground.phrase}"):
            assert scene.floor == floor and (labels == "floor").mean() > 0.05
            rest = rest.removeprefix(f"on {ground.phrase}").strip()
            break
    if rest.startswith("in front of"):
        assert (labels == "wall").mean() > 0.02
        assert scene.wall == "painted" or rest == f"in front of {WALLS[scene.wall].phrase}"
    elif rest:
        assert rest == f"under {SKIES[scene.sky].phrase}"
        assert (labels == "sky").mean() > 0.02


def test_round_trees_show_their_trunks() -> None:
    trees = 0
    for index in range(400):
        scene = compose(13, index)
        for thing in scene.things:
            bodies = [k for k, body in enumerate(scene.primitives) if body.segment == thing.segment]
            if thing.shape == "tree" and scene.primitives[bodies[1]].kind == "sphere":
                view = View.of(scene, 64, 64)
                assert (nearest(scene, view, view.grid())[1] == bodies[0]).sum() >= 4
                trees += 1
    assert trees > 20


def test_every_relation_of_a_scene_holds_both_ways_and_every_object_stands_on_something() -> None:
    for index in range(200):
        scene = compose(9, index)
        found = {(r.subject, r.relation, r.object) for r in scene.relations}
        assert {relation for _, relation, _ in found} <= {*RELATIONS, STANDS_ON}
        for a, relation, b in found:
            if relation in INVERSE:
                assert (b, INVERSE[relation], a) in found
        for number, thing in enumerate(scene.things):
            support = (number, "on top of" if thing.supported_by >= 0 else STANDS_ON, thing.supported_by)
            assert support in found


def test_colours_of_a_plain_scene_differ_from_each_other_and_from_the_wall() -> None:
    for index in range(200):
        scene = compose(10, index)
        colours = [thing.colour for thing in scene.things]
        assert len(set(colours)) == len(colours)
        painted = re.search(r"(\w+) wall$", scene.caption)
        assert painted is None or painted[1] not in colours


def test_captions_use_every_word_of_the_vocabulary_and_no_other() -> None:
    used: set[str] = set()
    for index in range(1500):
        used |= set(compose(0, index, variety=0.8 if index % 5 == 0 else 0.0).caption.split())
    assert used == set(words())
    assert len(words()) <= 80


def test_captions_of_randomised_scenes_leave_out_what_would_not_be_true() -> None:
    for index in range(100):
        scene = compose(12, index, variety=1.0)
        assert not scene.floor and not scene.wall and not scene.sky
        odd = [scene.things[i] for i in scene.mentioned if not scene.things[i].hue_matters]
        assert all(grammar.name(thing).split()[1:] == [thing.shape] for thing in odd)
