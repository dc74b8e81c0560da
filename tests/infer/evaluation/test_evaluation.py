"""Captions read back, and what is in a picture: objects, relations, plausibility; the shipped detector on real renderings."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from extract.world import compose, render
from extract.world.grammar import is_caption, parse
from extract.world.vocabulary import COLOURS, INVERSE, RELATIONS, SHAPES
from infer.evaluation.demo.crop_nets import load_close
from infer.evaluation.demo.detector import Detector
from infer.evaluation.demo.layout import RELATED, SHAPE, Found, find_objects, holds, joined, judge
from infer.evaluation.demo.pixel_net import COLOUR_CLASSES, PLACES, SHAPE_CLASSES, Seen, load_detector
from infer.evaluation.demo.plausibility import plausibility
from shards.core.errors import UserError

SIDE = 32


def test_captions_of_many_scenes_are_read_back_exactly():
    seen = set()
    for index in range(150):
        scene = compose(31, index)
        caption = parse(scene.caption)
        assert str(caption) == scene.caption
        named = [(scene.things[i].shape, scene.things[i].colour) for i in scene.mentioned]
        assert [(one.shape, one.colour) for one in caption.objects] == named
        true = {(r.subject, r.relation, r.object) for r in scene.relations}
        for stated in caption.relations:
            seen.add(stated.relation)
            assert (scene.mentioned[stated.subject], stated.relation, scene.mentioned[stated.object]) in true
        assert caption.floor in ("", scene.floor) and caption.sky in ("", scene.sky)
    assert seen == set(RELATIONS)


@pytest.mark.parametrize("text", ["", "a dog", "a red sphere left of", "a red sphere on a blue wall", "red sphere"])
def test_other_texts_are_no_captions(text):
    assert not is_caption(text)
    with pytest.raises(UserError, match="no caption"):
        parse(text)


# ---- pictures made of boxes ------------------------------------------------------------------------------------------


def box(
    top: int, left: int, bottom: int, right: int, shape: str, colour: str, depth_m: float, sure: float = 0.9
) -> Found:
    """A thing whose shape is as `sure`, and a tree otherwise; its colour is certain."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top:bottom, left:right] = True
    shapes = sure * one_of(SHAPES, shape) + (1 - sure) * one_of(SHAPES, "tree")
    return Found(mask, shapes, one_of(tuple(COLOURS), colour), depth_m)


def one_of(names: tuple[str, ...], name: str) -> np.ndarray:
    return np.array([float(one == name) for one in names], np.float32)


def related(found: Sequence[Found], **said: str) -> list[Found]:
    """The objects with what a close look says of them: cone="on top of cube"."""
    places = {one.shape: number for number, one in enumerate(found)}
    tables = np.zeros((len(found), len(found), len(RELATED)), np.float32)
    tables[..., 0] = 1
    for shape, what in said.items():
        relation, _, other = what.rpartition(" ")
        tables[places[shape], places[other]] = one_of(RELATED, relation)
        back = INVERSE.get(relation, "under")
        tables[places[other], places[shape]] = one_of(RELATED, back)
    return [dataclasses.replace(one, number=i, related=tables[i]) for i, one in enumerate(found)]


def picture(*things: Found, floor_from: int = 8) -> Seen:
    """What a perfect detector sees: wall above floor, then the things, later ones in front."""
    shape = np.zeros((len(SHAPE_CLASSES), SIDE, SIDE), np.float32)
    colour = np.zeros((len(COLOUR_CLASSES), SIDE, SIDE), np.float32)
    depth = np.full((SIDE, SIDE), 9.0, np.float32)
    shape[PLACES.index("wall"), :floor_from], shape[PLACES.index("floor"), floor_from:] = 1, 1
    colour[0] = 1
    for one in things:
        shape[:, one.mask], colour[:, one.mask] = 0, 0
        shape[len(PLACES) :, one.mask], colour[1:, one.mask] = one.shapes[:, None], one.colours[:, None]
        depth[one.mask] = one.depth_m
    return Seen(shape, colour, depth, np.zeros(4, np.float32))


CUBE = box(16, 4, 24, 12, "cube", "blue", 4.0)
BALL = box(16, 20, 24, 28, "sphere", "red", 4.0)
ON_CUBE = box(10, 5, 16, 11, "cone", "green", 4.1)
BEHIND_CUBE = box(10, 5, 16, 11, "cone", "green", 7.0)


def test_objects_are_found_with_shape_colour_place_and_distance():
    found = find_objects(picture(CUBE, BALL))
    assert {(one.shape, one.colour) for one in found} == {("cube", "blue"), ("sphere", "red")}
    cube = next(one for one in found if one.shape == "cube")
    assert (cube.left, cube.right, cube.bottom, cube.x) == (4 / SIDE, 12 / SIDE, 24 / SIDE, 8 / SIDE)
    assert cube.depth_m == 4.0 and cube.sure == pytest.approx(0.9)


def test_a_speck_is_no_object():
    assert find_objects(picture(box(10, 10, 12, 12, "cube", "blue", 4.0))) == []


@pytest.mark.parametrize(
    ("relation", "a", "b"),
    [
        ("left of", *related([CUBE, BALL])),
        ("right of", *related([BALL, CUBE])),
        ("on top of", *related([ON_CUBE, CUBE], cone="on top of cube")),
        ("behind", *related([BEHIND_CUBE, CUBE], cone="behind cube")),
        ("in front of", *related([CUBE, BEHIND_CUBE], cone="behind cube")),
    ],
)
def test_exactly_the_right_relation_holds(relation, a, b):
    assert [name for name in RELATIONS if holds(name, a, b)] == [relation]


def test_a_caption_is_judged_by_objects_colours_number_and_relation():
    caption = parse("a blue cube left of a red sphere on grass")
    right = judge(caption, [CUBE, BALL])
    assert right.layout and right.objects and right.colours and right.once
    swapped = judge(parse("a blue cube right of a red sphere"), [CUBE, BALL])
    assert swapped.objects and not swapped.layout and swapped.relations == (("right of", False),)
    melted = judge(caption, [CUBE, box(16, 20, 24, 28, "cone", "red", 4.0)])
    assert melted.colours and not melted.objects and not melted.layout
    doubled = judge(caption, [CUBE, BALL, box(1, 1, 8, 8, "cube", "blue", 4.0)])
    assert doubled.layout and not doubled.once
    assert not judge(caption, []).colours


def test_parts_of_one_name_that_touch_are_one_object() -> None:
    roof, walls = box(8, 4, 16, 12, "house", "red", 4.0), box(16, 4, 24, 12, "house", "red", 4.1, sure=0.95)
    (whole,) = joined([roof, walls])
    assert np.array_equal(whole.mask, roof.mask | walls.mask) and whole.sure == walls.sure and whole.depth_m == 4.1
    far, other = box(16, 20, 24, 28, "house", "red", 4.0), box(8, 4, 16, 12, "cone", "red", 4.0)
    unsure = box(8, 4, 16, 12, "house", "red", 4.0, sure=0.45)
    assert [len(joined([walls, one])) for one in (far, other, unsure)] == [2, 2, 2]
    assert judge(parse("a red house"), [roof, walls]).once and not judge(parse("a red house"), [walls, far]).once


def test_a_name_is_granted_to_what_may_be_it_but_one_thing_is_never_two():
    likely = box(16, 4, 24, 12, "cube", "blue", 4.0, sure=2 * SHAPE)
    unlikely = box(16, 4, 24, 12, "cube", "blue", 4.0, sure=SHAPE / 2)
    assert judge(parse("a blue cube"), [likely]).objects and not judge(parse("a blue cube"), [unlikely]).objects
    both = parse("a blue cube and a blue tree")
    assert not judge(both, [likely]).objects
    assert judge(both, [likely, box(16, 20, 24, 28, "tree", "blue", 4.0)]).objects


def test_plausible_is_what_stands_once_whole_and_in_order():
    def checks(*things: Found, depth: np.ndarray | None = None, **said: str) -> dict[str, float]:
        seen = picture(*things)
        return plausibility(seen, related(find_objects(seen), **said), depth)

    assert checks(CUBE, ON_CUBE, cone="on top of cube")["rests"] == 1
    assert checks(BEHIND_CUBE, CUBE, cone="behind cube")["rests"] == 1  # hidden below by what is nearer
    assert checks(box(0, 4, 6, 12, "cube", "blue", 4.0))["rests"] == 0  # its foot is on the wall
    ball, cone = box(16, 4, 24, 12, "sphere", "red", 4.0), box(8, 4, 16, 12, "cube", "blue", 4.0)
    assert checks(ball, cone, cube="on top of sphere")["rests"] == 0  # nothing stands on a sphere
    assert np.isnan(checks(CUBE, BALL)["order"])  # feet at one height do not tell
    assert checks(CUBE, BEHIND_CUBE)["order"] == 1
    wrong = np.where(CUBE.mask, np.float32(9), np.float32(4))
    assert checks(CUBE, BEHIND_CUBE, depth=wrong)["order"] == 0
    assert checks(CUBE, box(16, 20, 24, 28, "cube", "blue", 4.0))["single"] == 0
    unsure = box(16, 4, 24, 12, "cube", "blue", 4.0, sure=0.45)
    assert checks(unsure)["whole"] == 1 and checks(unsure)["single"] == 1  # then it is a tree, and surely one
    assert np.isnan(checks()["rests"])


# ---- the shipped detector --------------------------------------------------------------------------------------------


def test_the_shipped_detector_tells_the_caption_of_a_rendering_from_others():
    scenes = [compose(777, index) for index in range(24)]
    captions = [parse(scene.caption) for scene in scenes]
    looks = Detector.load()([render(scene, 64).image for scene in scenes])
    right = np.mean([judge(caption, found).layout for caption, (_, found) in zip(captions, looks, strict=True)])
    others = zip(captions, [*looks[1:], looks[0]], strict=True)
    wrong = np.mean([judge(caption, found).layout for caption, (_, found) in others])
    assert right > 0.7 and right > 5 * wrong


def test_images_of_another_size_are_brought_to_the_detectors():
    detector = Detector.load()
    small, large = (detector.first([render(compose(777, 3), size).image])[0] for size in (64, 128))
    assert large.shape.shape == small.shape.shape
    assert np.abs(large.features - small.features).mean() < 0.2 * np.abs(small.features).mean() + 0.05


def test_a_checkpoint_that_is_damaged_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_detector(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_close("pairs", tmp_path)
