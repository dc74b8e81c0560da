"""Quality scores find planted bad labels: each kind of damage has a score that tells it from good labels."""

import dataclasses

import numpy as np
import pytest

from extract.world import compose, render
from shards.intrinsics import IntrinsicMap
from shards.quality import quality_scores

COUNT = 40
Maps = dict[str, IntrinsicMap]


@dataclasses.dataclass(frozen=True)
class Labelled:
    image: np.ndarray
    maps: Maps


@pytest.fixture(scope="module")
def world() -> list[Labelled]:
    """Scenes of the demo world with their true maps, made a little worse: nobody's estimator is perfect."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(COUNT):
        scene = render(compose(11, index), 128)
        z = scene.depth_m * np.exp(rng.normal(0, 0.002, scene.depth_m.shape)).astype(np.float32)
        n = scene.normal + rng.normal(0, 0.05, scene.normal.shape).astype(np.float32)
        n /= np.linalg.norm(n, axis=2, keepdims=True)
        maps = {
            "depth": IntrinsicMap(z, {"kind": "metric", "focal_px": scene.focal_px}),
            "normal": IntrinsicMap(n),
            "segmentation": IntrinsicMap(scene.segmentation),
            "line": IntrinsicMap(scene.line),
        }
        made.append(Labelled(scene.image, maps))
    return made


def constant_depth(one: Maps, other: Maps) -> Maps:
    return {**one, "depth": dataclasses.replace(one["depth"], values=np.full_like(one["depth"].values, 3))}


def flipped_normals(one: Maps, other: Maps) -> Maps:
    return {**one, "normal": IntrinsicMap(one["normal"].values * np.float32([1, -1, 1]))}


def all_of_another(one: Maps, other: Maps) -> Maps:
    return other


def one_of_another(name: str):  # type: ignore[no-untyped-def]
    return lambda one, other: {**one, name: other[name]}


@pytest.mark.parametrize(
    ("score", "damage", "worse"),
    [
        ("depth_range", constant_depth, "low"),
        ("depth_flatness", constant_depth, "high"),
        ("normal_depth_angle", flipped_normals, "high"),
        ("normal_depth_angle", one_of_another("normal"), "high"),
        ("depth_edges", one_of_another("depth"), "low"),
        ("segment_edges", one_of_another("segmentation"), "low"),
        ("line_edges", one_of_another("line"), "low"),
        ("segment_edges", all_of_another, "low"),
    ],
)
def test_a_score_tells_planted_bad_labels_from_good_ones(world, score, damage, worse) -> None:  # type: ignore[no-untyped-def]
    good = [quality_scores(each.maps, each.image)[score] for each in world]
    others = [*world[1:], world[0]]
    bad = [
        quality_scores(damage(each.maps, other.maps), each.image)[score]
        for each, other in zip(world, others, strict=True)
    ]
    area = roc_auc(good, bad) if worse == "high" else roc_auc(bad, good)
    assert area >= 0.95, f"{score}: {area:.3f}"


def roc_auc(low: list[float], high: list[float]) -> float:
    """The share of pairs in which the one of `high` is larger; ties count half."""
    a, b = np.asarray(low)[:, None], np.asarray(high)[None]
    return float(((b > a) + 0.5 * (b == a)).mean())
