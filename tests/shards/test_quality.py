"""Quality scores: exact on hand-made maps, and different for good and bad labels."""

import numpy as np
import pytest

from shards.intrinsics import IntrinsicMap
from shards.quality import depth_to_normal, quality_scores


def plane(height: int = 40, width: int = 60, focal_px: float = 50.0) -> tuple[np.ndarray, np.ndarray]:
    """Depth and normals of the floor y = -1.5 seen by a level camera, below the horizon; the rest is sky."""
    v = np.arange(height) + 0.5 - height / 2
    z = np.where(v > 2, 1.5 * focal_px / np.where(v > 2, v, 1), np.inf)[:, None] * np.ones((1, width))
    n = np.where(np.isfinite(z)[..., None], [0.0, 1.0, 0.0], np.nan)
    return z.astype(np.float32), n.astype(np.float32)


def test_normals_of_a_floors_depth_point_up() -> None:
    z, n = plane()
    made = depth_to_normal(z, 50.0)
    inner = np.isfinite(made).all(axis=2)
    assert inner.sum() > 500
    np.testing.assert_allclose(made[inner], n[inner], atol=1e-3)


def test_normals_of_a_wall_face_the_camera() -> None:
    np.testing.assert_allclose(depth_to_normal(np.full((5, 5), 3, np.float32), 5)[2, 2], [0, 0, 1], atol=1e-6)


def test_normals_of_a_sphere_are_its_radii() -> None:
    size, focal, radius = 201, 300.0, 1.0
    u = (np.arange(size) + 0.5 - size / 2) / focal
    rays = np.stack(
        [np.broadcast_to(u, (size, size)), -np.broadcast_to(u[:, None], (size, size)), -np.ones((size, size))], 2
    )
    centre = np.array([0, 0, -4.0])
    a, b = (rays**2).sum(2), rays @ centre
    root = b**2 - a * (centre @ centre - radius**2)
    z = np.where(root > 0, (b - np.sqrt(np.maximum(root, 0))) / a, np.nan)
    expected = (rays * z[..., None] - centre) / radius
    made = depth_to_normal(z.astype(np.float32), focal)
    facing = np.isfinite(made).all(2) & (expected[..., 2] > 0.5)
    angle = np.degrees(np.arccos(np.clip((made * expected).sum(2)[facing], -1, 1)))
    assert angle.mean() < 0.5


def test_consistent_maps_score_near_zero_degrees_and_flipped_normals_near_180() -> None:
    z, n = plane()
    depth = IntrinsicMap(z, {"kind": "metric", "focal_px": 50.0})
    assert quality_scores({"depth": depth, "normal": IntrinsicMap(n)})["normal_depth_angle"] < 0.5
    assert quality_scores({"depth": depth, "normal": IntrinsicMap(-n)})["normal_depth_angle"] > 179


def test_scores_of_hand_made_maps() -> None:
    z = np.array([[1, 1, np.nan], [1, 1, np.inf]], np.float32)
    ids = np.array([[1, 1, 0], [2, 2, 0]], np.uint16)
    line = np.array([[0, 0, 1], [0, 0.5, 0]], np.float32)
    scores = quality_scores(
        {"depth": IntrinsicMap(z, {"kind": "metric"}), "segmentation": IntrinsicMap(ids), "line": IntrinsicMap(line)}
    )
    assert scores == pytest.approx(
        {
            "depth_invalid": 1 / 6,
            "depth_range": 0.0,
            "depth_flatness": 0.5,
            "segments": 2.0,
            "segmented": 4 / 6,
            "line_density": 0.25,
        },
        abs=1e-6,
    )


def test_maps_without_a_single_valid_pixel_score_as_bad_and_do_not_fail() -> None:
    scores = quality_scores(
        {
            "depth": IntrinsicMap(np.full((4, 4), np.nan, np.float32), {"kind": "metric"}),
            "normal": IntrinsicMap(np.full((4, 4, 3), np.nan, np.float32)),
        }
    )
    assert scores["depth_flatness"] == 1 and scores["depth_invalid"] == 1 and scores["normal_depth_angle"] == 180
    assert (
        quality_scores({"depth": IntrinsicMap(np.ones((1, 1), np.float32), {"kind": "relative"})})["depth_range"] == 0
    )
