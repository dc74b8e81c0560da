"""The demo world: exact maps, and the same scene at any size. Its captions: test_world_captions.py."""

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

from extract.sources.demo import DemoSettings, DemoSource, metadata
from extract.world import Rendering, Scene, compose, contact_sheet, render
from extract.world.primitives import FACES, KINDS, describe_hits, intersect
from extract.world.textures import TEXTURES, sample
from extract.world.tracing import EVERYWHERE, View, _inside, nearest, shadows, trace
from shards.core.errors import UserError
from shards.intrinsics import INTRINSICS, IntrinsicMap, order_segments

SOLIDS = [kind for kind in KINDS if kind != "plane"]


@pytest.fixture(scope="module")
def pictures() -> list[tuple[Scene, Rendering]]:
    """Sixteen plain scenes and sixteen randomised ones."""
    scenes = [compose(3, i) for i in range(16)] + [compose(3, i, variety=1.0) for i in range(16)]
    return [(scene, render(scene, 96)) for scene in scenes]


# ---- rays and bodies -------------------------------------------------------------------------------------------------


def _outside(kind: str, p: np.ndarray) -> np.ndarray:
    """An implicit function of each body, negative inside: float64, from its definition. p: (3, N)."""
    x, y, z = p
    if kind == "sphere":
        return x * x + y * y + z * z - 1
    if kind == "cylinder":
        return np.maximum(np.hypot(x, z) - 1, np.abs(y) - 1)
    if kind == "cone":
        return np.maximum(np.hypot(x, z) - (1 - y) / 2, -1 - y)
    return (FACES[kind].astype(float) @ p - 1).max(axis=0)


@pytest.mark.parametrize("kind", SOLIDS)
def test_rays_meet_bodies_where_a_float64_search_along_the_ray_says(kind: str) -> None:
    rng = np.random.default_rng(SOLIDS.index(kind))
    n = 400
    start = rng.normal(size=(3, n))
    start *= rng.uniform(2.5, 12, n) / np.linalg.norm(start, axis=0)
    direction = rng.uniform(-1.1, 1.1, (3, n)) - start
    t_in, t_out = intersect(kind, start.astype(np.float32), direction.astype(np.float32))

    t = np.linspace(0, 2, 4001)
    inside = _outside(kind, (start[:, :, None] + t * direction[:, :, None]).reshape(3, -1)).reshape(n, -1) < 0
    chord = inside.sum(axis=1) * (t[1] - t[0])
    sure_hit, sure_miss = chord > 0.01, chord == 0
    hit = t_in <= t_out
    assert hit[sure_hit].all()
    assert sure_hit.sum() > 100
    assert (t_out - t_in)[sure_miss & hit].max(initial=0) < 0.03  # only grazing rays may differ
    low, high = t[inside.argmax(axis=1)] - (t[1] - t[0]), t[inside.argmax(axis=1)]
    for _ in range(40):
        middle = (low + high) / 2
        within = _outside(kind, start + middle * direction) < 0
        low, high = np.where(within, low, middle), np.where(within, middle, high)
    assert np.abs(t_in - high)[sure_hit].max() < 2e-4


@pytest.mark.parametrize("kind", SOLIDS)
def test_normals_of_stretched_bodies_are_the_gradient_of_their_implicit_function(kind: str) -> None:
    rng = np.random.default_rng(7)
    scale = np.array([0.7, 1.6, 1.1])
    start = rng.normal(size=(3, 600))
    start *= 4 / np.linalg.norm(start, axis=0)
    direction = rng.uniform(-0.6, 0.6, (3, 600)) - start
    t_in, t_out = intersect(kind, start, direction)
    p = (start + t_in * direction)[:, t_in <= t_out]
    _, normal, _ = describe_hits(kind, p.astype(np.float32), scale.astype(np.float32))
    steps = 1e-4 * np.eye(3) / scale[:, None]
    up = np.stack([_outside(kind, p + step[:, None]) for step in steps])
    down = np.stack([_outside(kind, p - step[:, None]) for step in steps])
    gradient = (up - down) / np.linalg.norm(up - down, axis=0)
    assert np.abs(np.linalg.norm(normal, axis=0) - 1).max() < 1e-5
    agreement = (normal * gradient).sum(axis=0)
    assert np.quantile(agreement, 0.02) > 0.9999  # all but hits within a hair of an edge


def test_culling_changes_neither_what_is_seen_nor_what_is_in_shadow() -> None:
    for index in range(12):
        scene = compose(11, index, variety=0.5)
        view = View.of(scene, 40, 56)
        rays = view.grid()
        depth = np.full(len(rays.x), np.inf)
        hits = trace(scene, view, rays)
        for body in scene.primitives:
            o = body.to_body @ (view.position[:, None] - body.middle)
            t_in, t_out = intersect(body.kind, o, body.to_body @ rays.direction)
            far = 100.0 if body.kind == "plane" else np.inf
            with np.errstate(invalid="ignore"):
                seen = (t_in <= t_out) & (t_in > 0.05) & (t_in < far)
            depth = np.where(seen & (t_in < depth), t_in, depth)
        np.testing.assert_allclose(nearest(scene, view, rays)[0], depth, rtol=1e-5)

        for light in scene.lights:
            target = np.array(light.point, np.float32)[:, None]
            way = np.broadcast_to(target, hits.point.shape) if light.sun else target - hits.point
            facing = (hits.normal * way).sum(axis=0) > 0
            dark = np.zeros(len(facing), bool)
            for k, body in enumerate(scene.primitives):
                if body.kind != "plane":
                    t_in, t_out = intersect(body.kind, body.to_body @ (hits.point - body.middle), body.to_body @ way)
                    limit = np.inf if light.sun else 1
                    dark |= (t_in <= t_out) & (t_out > 1e-4) & (t_in < limit) & (hits.bodies() != k)
            assert (shadows(scene, light, hits, facing) != (dark & facing)).mean() < 1e-3


def test_union_of_boxes_holds_each_box() -> None:
    boxes = np.array([[0.0, 0, 1, 1], [5, -2, 6, 0]]).T
    x, y = np.array([0.5, 5.5, 7.0], np.float32), np.array([0.5, -1.0, 0.0], np.float32)
    assert _inside(x, y, boxes).tolist() == [True, True, False]


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_are_periodic_and_fade_to_their_mean_far_away(texture: str) -> None:
    uv = np.random.default_rng(0).random((2, 500)).astype(np.float32)
    near, far = np.full(500, 1e-3, np.float32), np.full(500, 4.0, np.float32)
    mix, shade = sample(texture, uv, near)
    shifted, _ = sample(texture, uv + np.array([[3], [-2]], np.float32), near)
    assert np.abs(mix - shifted).mean() < 0.01  # float32 positions: a few land on the other side of a sharp edge
    assert mix.min() >= -1e-3 and mix.max() <= 1 + 1e-3 and shade.min() > 0
    assert np.ptp(sample(texture, uv, far)[0]) < 1e-5


# ---- maps ------------------------------------------------------------------------------------------------------------


def _labels(rendering: Rendering) -> np.ndarray:
    return np.array(["", *rendering.segments])[rendering.segmentation]


def _quiet(rendering: Rendering) -> np.ndarray:
    """bool (H, W): pixels whose 5 x 5 neighbourhood is one segment of one smooth surface."""
    ids = rendering.segmentation.astype(np.float32)
    square = np.ones((5, 5), np.uint8)
    same = cv2.erode(ids, square) == cv2.dilate(ids, square)
    return same & (cv2.dilate(rendering.line, square) == 0) & np.isfinite(rendering.depth_m)


def test_maps_have_the_forms_that_shards_store(pictures: list[tuple[Scene, Rendering]]) -> None:
    for _, r in pictures:
        assert r.image.dtype == np.uint8 and r.image.shape == (96, 96, 3)
        maps = {
            "depth": IntrinsicMap(r.depth_m, {"kind": "metric"}),
            "normal": IntrinsicMap(r.normal),
            "segmentation": IntrinsicMap(r.segmentation),
            "line": IntrinsicMap(r.line),
        }
        for name, values in maps.items():
            png, info = INTRINSICS[name].encode(values)
            INTRINSICS[name].decode(png, info)
        assert r.depth_m.min() > 0.05
        assert np.array_equal(order_segments(r.segmentation), r.segmentation)
        assert r.segmentation.min() == 1 and r.segmentation.max() == len(r.segments)


def test_sky_is_infinitely_far_and_has_no_normal_and_all_else_has_both(pictures: list[tuple[Scene, Rendering]]) -> None:
    for _, r in pictures:
        sky = _labels(r) == "sky"
        assert np.array_equal(sky, np.isinf(r.depth_m))
        assert np.array_equal(sky, np.isnan(r.normal).any(axis=2))
        assert np.abs(np.linalg.norm(r.normal[~sky], axis=1) - 1).max(initial=0) < 1e-4


def test_normals_are_those_of_the_depth_map_on_smooth_areas(pictures: list[tuple[Scene, Rendering]]) -> None:
    angles = []
    for scene, _ in pictures:
        r = render(scene, 256)
        at = np.arange(256) + 0.5 - 128
        x, y = np.meshgrid(at, -at)
        z = r.depth_m.astype(float)
        p = np.stack([x * z / r.focal_px, y * z / r.focal_px, -z], axis=2)
        with np.errstate(invalid="ignore"):
            across, up = p[1:-1, 2:] - p[1:-1, :-2], p[:-2, 1:-1] - p[2:, 1:-1]
            n = np.cross(across, up)
            n /= np.linalg.norm(n, axis=2, keepdims=True)
            cosine = (n * r.normal[1:-1, 1:-1]).sum(axis=2)
        angles.append(np.degrees(np.arccos(np.clip(cosine[_quiet(r)[1:-1, 1:-1]], -1, 1))))
    every = np.concatenate(angles)
    assert np.median(every) < 0.3
    assert np.quantile(every, 0.99) < 3


def test_normals_face_the_camera_and_floors_face_up(pictures: list[tuple[Scene, Rendering]]) -> None:
    for scene, r in pictures:
        at = np.arange(96) + 0.5 - 48
        x, y = np.meshgrid(at, -at)
        to_eye = np.stack([-x, -y, np.full_like(x, r.focal_px)], axis=2)
        assert np.nanmin((to_eye * r.normal).sum(axis=2) / np.linalg.norm(to_eye, axis=2)) > -0.01
        floor = r.normal[_labels(r) == "floor"]
        assert (floor[:, 1] > 0).all()
        if not scene.camera.roll:
            np.testing.assert_allclose(
                floor, [[0, np.cos(scene.camera.pitch), np.sin(scene.camera.pitch)]] * len(floor), atol=1e-5
            )


def test_outlines_cover_the_borders_of_segments_and_nothing_smooth(pictures: list[tuple[Scene, Rendering]]) -> None:
    covered, borders, smooth = 0, 0, list[bool]()
    for _, r in pictures:
        ids = r.segmentation.astype(int)
        border = np.zeros(ids.shape, bool)
        border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
        border[1:] |= ids[1:] != ids[:-1]
        near = cv2.dilate(r.line, np.ones((3, 3), np.uint8))
        covered += (near[border] > 0.5).sum()
        borders += border.sum()
        normal = np.nan_to_num(r.normal)
        square = np.ones((7, 7), np.uint8)
        flat = np.ptp(np.stack([cv2.erode(normal, square), cv2.dilate(normal, square)]), axis=0).max(axis=2) < 1e-3
        flat &= cv2.erode(r.segmentation, square) == cv2.dilate(r.segmentation, square)
        distance = np.where(np.isfinite(r.depth_m), r.depth_m, 1e3)
        flat &= np.abs(cv2.Laplacian(1 / distance, cv2.CV_32F)) < 1e-3  # a window is flat too, but it stands out
        shapes = np.isin(_labels(r), ["floor", "wall", "sky", "cube", "pyramid"])
        smooth += (r.line[flat & shapes] == 0).tolist()
    assert covered == borders > 5000
    assert np.mean(smooth) > 0.9998  # something too thin for the pixel centres may still be seen and drawn
    assert len(smooth) > 50_000


@pytest.mark.parametrize("size", [64, 160, 400])
def test_lines_are_one_to_two_pixels_wide_at_any_size(size: int) -> None:
    widths = []
    for index in range(60):
        scene = compose(5, index)
        if scene.sky and scene.primitives[-1].kind != "plane":
            r = render(scene, size)
            labels = _labels(r)
            empty = (np.isin(labels, ["sky", "floor"])).all(axis=0) & (labels == "sky").any(axis=0)
            widths += r.line[:, empty].sum(axis=0).tolist()
    assert len(widths) > 50
    assert 1.0 <= np.mean(widths) <= 2.0


# ---- the same scene at any size, every time --------------------------------------------------------------------------


def test_a_scene_and_its_picture_are_the_same_every_time() -> None:
    for variety in (0.0, 1.0):
        first, again = (render(compose(4, 9, variety=variety), 80) for _ in range(2))
        for name in ("image", "depth_m", "normal", "segmentation", "line"):
            assert getattr(first, name).tobytes() == getattr(again, name).tobytes()
        assert (first.caption, first.objects, first.segments) == (again.caption, again.objects, again.segments)
    captions = {compose(seed, index).caption for seed in range(2) for index in range(20)}
    assert len(captions) > 35


def test_the_maps_do_not_depend_on_the_size() -> None:
    for index in range(10):
        scene = compose(6, index)
        small, large = (
            render(scene, 64),
            render(scene, 192),
        )  # every third pixel centre of the large is one of the small
        assert small.caption == large.caption
        assert large.focal_px == pytest.approx(3 * small.focal_px)
        np.testing.assert_allclose(small.depth_m, large.depth_m[1::3, 1::3], rtol=2e-3)
        assert np.array_equal(_labels(small), _labels(large)[1::3, 1::3])


@pytest.mark.parametrize(("height", "width"), [(64, 120), (100, 64)])
def test_the_middle_square_does_not_depend_on_the_aspect_ratio(height: int, width: int) -> None:
    scene = compose(6, 3)
    square, other = render(scene, 64), render(scene, (height, width))
    top, left = (height - 64) // 2, (width - 64) // 2
    part = (slice(top, top + 64), slice(left, left + 64))
    assert other.image.shape == (height, width, 3)
    assert np.array_equal(np.isinf(other.depth_m[part]), np.isinf(square.depth_m))
    np.testing.assert_allclose(other.depth_m[part], square.depth_m, rtol=2e-3)


def test_a_picture_too_small_to_show_anything_is_refused() -> None:
    with pytest.raises(UserError, match="8 pixels"):
        render(compose(0, 0), 4)


# ---- the source ------------------------------------------------------------------------------------------------------


def _form(value: Any) -> Any:
    """The types in a JSON value; lists must be of one form and never empty."""
    if isinstance(value, dict):
        return {key: _form(v) for key, v in value.items()}
    if isinstance(value, list):
        forms = [_form(v) for v in value]
        assert forms and all(form == forms[0] for form in forms)
        return [forms[0]]
    assert value is not None
    return type(value)


def test_metadata_has_the_same_keys_and_types_in_every_sample() -> None:
    scenes = [compose(0, index) for index in range(60)]
    forms = [_form(metadata(scene, render(scene, 48))) for scene in scenes]
    assert all(form == forms[0] for form in forms)


def test_the_demo_source_yields_each_scene_once_under_stable_keys() -> None:
    source = DemoSource(DemoSettings(seed=2, count=7, size_px=32))
    units = list(source.units(3))
    assert [unit.items for unit in units] == [(0, 3), (3, 6), (6, 7)]
    assert [unit.items for unit in source.units(3, limit=4)] == [(0, 3), (3, 4)]
    samples = [sample for unit in units for sample in source.read(unit)]
    assert [sample.key for sample in samples] == [f"demo-2-{i:06d}" for i in range(7)]
    assert source.total() == 7
    for index, one in enumerate(samples):
        assert one.meta["index"] == index
        assert np.array_equal(one.image, render(compose(2, index), 32).image)
    assert source.describe() == {"kind": "demo", "world": 1, "seed": 2, "count": 7, "size_px": 32}


@pytest.mark.parametrize("setting", [{"seed": -1}, {"count": 0}, {"size_px": 8}])
def test_demo_settings_out_of_range_are_refused_by_name(setting: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"source.{next(iter(setting))}"):
        DemoSettings(**setting)


def test_a_contact_sheet_shows_each_rendering_beside_its_maps(pictures: list[tuple[Scene, Rendering]]) -> None:
    sheet = contact_sheet([r for _, r in pictures[:3]], columns=2)
    assert sheet.shape == (2 * 96, 2 * 5 * 96, 3)
    assert np.array_equal(sheet[:96, :96], pictures[0][1].image)


def test_bodies_beside_the_camera_are_not_culled() -> None:
    scene = compose(0, 0)
    view = View.of(scene, 32, 32)
    body = next(body for body in scene.primitives if body.kind == "box")
    beside = replace(body, centre=view.position + view.rotation @ [0.2, 0, 0], scale=np.ones(3))
    assert view.bounds([scene.primitives[0], beside, body])[:2] == [EVERYWHERE, EVERYWHERE]
    assert np.isfinite(view.bounds([body])).all()
