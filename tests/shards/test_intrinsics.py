"""The stored form of the maps: what goes in comes out, within the stated bounds, and nothing else is accepted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from shards.intrinsics import INTRINSICS, IntrinsicMap, MapError, decode_png, encode_png, order_segments
from shards.metrics import edge_f_score, segment_boundaries
from shards.packing import CHANNELS, PALETTE, SLICES, DepthRange, pack, segment_colours, unpack, valid_mask

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)


def round_trip(name: str, item: IntrinsicMap) -> IntrinsicMap:
    png, info = INTRINSICS[name].encode(item)
    return INTRINSICS[name].decode(png, info)


@given(hnp.arrays(np.float32, SHAPES, elements=st.floats(0.0625, 1000, width=32) | st.sampled_from([np.inf, np.nan])))
@settings(deadline=None)
def test_metric_depth_survives_storage_within_0_008_percent(z: np.ndarray) -> None:
    stored = round_trip("depth", IntrinsicMap(z, {"kind": "metric"})).values
    finite = np.isfinite(z)
    assert np.array_equal(np.isnan(stored), np.isnan(z)) and np.array_equal(np.isinf(stored), np.isinf(z))
    error = np.abs(stored[finite].astype(np.float64) / z[finite] - 1)
    assert (error <= 0.8e-4).all()


def test_metric_depth_beyond_the_range_is_clipped_to_it() -> None:
    stored = round_trip("depth", IntrinsicMap(np.array([[0.001, 5000]], np.float32), {"kind": "metric"})).values
    assert stored == pytest.approx(np.array([[0.05, 1000]]), rel=1e-5)


@given(hnp.arrays(np.float32, SHAPES, elements=st.floats(-1000, 1000, width=32) | st.sampled_from([-np.inf, np.nan])))
@settings(deadline=None)
def test_relative_depth_survives_storage_within_half_a_step(d: np.ndarray) -> None:
    png, info = INTRINSICS["depth"].encode(IntrinsicMap(d, {"kind": "relative"}))
    stored, finite = INTRINSICS["depth"].decode(png, info).values, np.isfinite(d)
    assert np.array_equal(np.isnan(stored), np.isnan(d)) and np.array_equal(np.isinf(stored), np.isinf(d))
    bound = (info["hi"] - info["lo"]) / 131066 + 1e-4  # half a step, and float32 of values up to 1000
    assert (np.abs(stored[finite] - d[finite]) <= bound).all()


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3)), elements=st.floats(-1, 1)))
@settings(deadline=None)
def test_normals_survive_storage_within_0_4_degrees(raw: np.ndarray) -> None:
    length = np.linalg.norm(raw, axis=2, keepdims=True)
    n = np.where(length > 1e-3, raw / np.maximum(length, 1e-9), np.nan).astype(np.float32)
    stored = round_trip("normal", IntrinsicMap(n)).values
    valid = np.isfinite(n).all(axis=2)
    assert np.array_equal(np.isfinite(stored).all(axis=2), valid)
    sine = np.linalg.norm(np.cross(stored[valid].astype(np.float64), n[valid].astype(np.float64)), axis=1)
    assert (np.degrees(np.arcsin(np.minimum(sine, 1))) < 0.4).all()


def test_mean_error_of_stored_normals_is_0_17_degrees() -> None:
    n = np.random.default_rng(0).normal(size=(200, 200, 3))
    n /= np.linalg.norm(n, axis=2, keepdims=True)
    stored = round_trip("normal", IntrinsicMap(n.astype(np.float32))).values
    sine = np.linalg.norm(np.cross(stored.astype(np.float64), n), axis=2)
    assert np.degrees(np.arcsin(sine)).mean() < 0.175


@given(hnp.arrays(np.int32, SHAPES, elements=st.integers(0, 9)))
@settings(deadline=None)
def test_segments_are_numbered_by_falling_area_then_first_pixel(raw: np.ndarray) -> None:
    ids = order_segments(raw)
    assert np.array_equal(ids == 0, raw == 0)
    assert len(np.unique(np.stack([ids.ravel(), raw.ravel()]), axis=1).T) == len(np.unique(raw))  # one to one
    keys = [(-(ids == i).sum(), np.flatnonzero(ids.ravel() == i)[0]) for i in range(1, ids.max() + 1)]
    assert keys == sorted(keys)
    assert np.array_equal(round_trip("segmentation", IntrinsicMap(ids)).values, ids)


@given(hnp.arrays(np.float32, SHAPES, elements=st.floats(0, 1, width=32)))
@settings(deadline=None)
def test_lines_survive_storage_within_half_a_grey_level(line: np.ndarray) -> None:
    assert np.abs(round_trip("line", IntrinsicMap(line)).values - line).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("name", "values", "info"),
    [
        ("depth", np.ones((4, 4), np.float64), {"kind": "metric"}),
        ("depth", np.ones((4, 4), np.float32), {}),
        ("depth", np.zeros((4, 4), np.float32), {"kind": "metric"}),
        ("normal", np.ones((4, 4, 3), np.float32), {}),
        ("normal", np.ones((4, 4), np.float32), {}),
        ("segmentation", np.full((4, 4), 7, np.uint16), {}),
        ("segmentation", np.ones((4, 4), np.int64), {}),
        ("line", np.full((4, 4), 1.5, np.float32), {}),
        ("line", np.full((4, 4), np.nan, np.float32), {}),
        ("line", np.ones((0, 4), np.float32), {}),
    ],
)
def test_a_map_that_breaks_the_conventions_is_refused(name: str, values: np.ndarray, info: dict) -> None:
    with pytest.raises(MapError):
        INTRINSICS[name].encode(IntrinsicMap(values, info))


def test_a_truncated_or_flipped_png_is_refused_and_never_filled_in() -> None:
    png = encode_png(np.random.default_rng(0).integers(0, 65535, (20, 20)).astype(np.uint16))
    for end in range(len(png)):
        with pytest.raises(MapError):
            decode_png(png[:end], np.uint16, channels=1)
    for position in range(0, len(png), 3):
        damaged = bytearray(png)
        damaged[position] ^= 8
        with pytest.raises(MapError):
            decode_png(bytes(damaged), np.uint16, channels=1)


def test_a_png_of_another_form_or_a_huge_one_is_refused_before_decoding() -> None:
    grey8 = encode_png(np.zeros((4, 4), np.uint8))
    with pytest.raises(MapError, match="bit depth 8"):
        decode_png(grey8, np.uint16, channels=1)
    bomb = bytearray(grey8)
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    with pytest.raises(MapError, match="larger than the limit"):
        decode_png(bytes(bomb), np.uint8, channels=1)


# ---- packing ---------------------------------------------------------------------------------------------------------


def example_maps(kind: str) -> dict[str, IntrinsicMap]:
    rng = np.random.default_rng(1)
    z = np.exp(rng.uniform(0, 3, (30, 40))).astype(np.float32)
    z[:3] = np.inf if kind == "metric" else -np.inf
    n = rng.normal(size=(30, 40, 3)).astype(np.float32)
    n /= np.linalg.norm(n, axis=2, keepdims=True)
    n[:3] = np.nan
    return {
        "depth": IntrinsicMap(z, {"kind": kind}),
        "normal": IntrinsicMap(n),
        "segmentation": IntrinsicMap(order_segments(rng.integers(0, 100, (30, 40)))),
        "line": IntrinsicMap(rng.random((30, 40)).astype(np.float32)),
    }


@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_unpacking_inverts_packing(kind: str) -> None:
    maps = example_maps(kind)
    packed, extent = pack(maps)
    assert packed.shape == (CHANNELS, 30, 40) and packed.dtype == np.float32 and np.abs(packed).max() <= 1
    back = unpack(packed, extent)
    low, high = sorted((extent.lo, extent.hi))
    expected = np.where(
        np.isfinite(maps["depth"].values), np.clip(maps["depth"].values, low, high), maps["depth"].values
    )
    np.testing.assert_allclose(back["depth"].values, expected, rtol=1e-4)
    np.testing.assert_allclose(back["normal"].values, maps["normal"].values, atol=1e-5)
    assert np.array_equal(back["segmentation"].values, maps["segmentation"].values)
    np.testing.assert_allclose(back["line"].values, maps["line"].values, atol=1e-6)


def test_near_is_plus_one_and_the_sky_is_minus_one_for_both_kinds_of_depth() -> None:
    z = np.linspace(1, 10, 1000, dtype=np.float32).reshape(20, 50)
    for kind, values, sky in (("metric", z, np.inf), ("relative", 1 / z, -np.inf)):
        values = values.copy()
        values[-1, -1] = sky
        packed = pack({"depth": IntrinsicMap(values, {"kind": kind})})[0][SLICES["depth"]][0]
        assert packed[0, 0] == 1 and packed[-1, -1] == -1 and packed[-1, -2] == pytest.approx(-0.8)


def test_missing_and_invalid_are_zero_and_masked() -> None:
    maps = example_maps("metric")
    del maps["line"]
    packed, mask = pack(maps)[0], valid_mask(maps)
    assert not packed[SLICES["line"]].any() and not mask[SLICES["line"]].any()
    assert not packed[SLICES["normal"]][:, :3].any() and not mask[SLICES["normal"]][:, :3].any()
    assert mask[SLICES["depth"]].all()  # the sky is a valid depth


def _scene(seed: int, side: int = 64) -> np.ndarray:
    """Ids of a floor, a wall, and things on them: discs and boxes of 6 to 30 % of the side."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side] / side
    ids = np.where(rows < rng.uniform(0.2, 0.4), 2, 1).astype(np.uint16)
    for thing in range(int(rng.integers(1, 4))):
        y, x, half = rng.uniform(0.3, 0.8), rng.uniform(0.15, 0.85), rng.uniform(0.06, 0.15)
        disc = (rows - y) ** 2 + (columns - x) ** 2 < half**2
        box = (np.abs(rows - y) < half) & (np.abs(columns - x) < half)
        ids[disc if thing % 2 else box] = 3 + thing
    return order_segments(ids)


@pytest.mark.parametrize("side", [64, 256])
def test_blurred_segments_have_no_strips_along_their_borders(side: int) -> None:
    """Blur of a border's width, a slow drift within segments, grain: as VAEs decode them."""
    rng = np.random.default_rng(5)
    for seed in range(12):
        ids = _scene(seed, side)
        colours = ndimage.gaussian_filter(segment_colours(ids), (0.7, 0.7, 0))
        drift = 0.12 * np.sin(np.mgrid[:side, :side][1] * 9 / side)[..., None]
        packed = np.zeros((CHANNELS, side, side), np.float32)
        noisy = colours + drift + rng.normal(0, 0.03, colours.shape)
        packed[SLICES["segmentation"]] = np.moveaxis(noisy, 2, 0)
        pixelwise, blurred = (unpack(packed, blurred=b)["segmentation"].values for b in (False, True))
        assert len(np.unique(blurred)) == len(np.unique(ids)) < len(np.unique(pixelwise))
        truth = segment_boundaries(ids)
        assert edge_f_score(segment_boundaries(blurred), truth, 1) > 0.97


def test_segments_that_were_not_blurred_lose_no_more_than_their_tips() -> None:
    for seed in range(12):
        ids = _scene(seed)
        packed = np.zeros((CHANNELS, *ids.shape), np.float32)
        packed[SLICES["segmentation"]] = np.moveaxis(segment_colours(ids), 2, 0)
        assert (unpack(packed, blurred=True)["segmentation"].values != ids).sum() <= 3


def test_an_image_of_one_colour_is_one_segment_and_one_of_noise_is_read() -> None:
    packed = np.full((CHANNELS, 16, 24), 0.5, np.float32)
    assert (unpack(packed, blurred=True)["segmentation"].values == 1).all()
    noise = np.random.default_rng(1).uniform(-1, 1, packed.shape).astype(np.float32)
    assert unpack(noise, blurred=True)["segmentation"].values.shape == (16, 24)


def test_segments_keep_their_ids_under_noise_below_a_quarter() -> None:
    maps = example_maps("metric")
    packed, extent = pack(maps)
    noise = np.random.default_rng(2).uniform(-0.24, 0.24, packed.shape).astype(np.float32)
    back = unpack(np.where(packed == 0, 0, packed) + noise, extent)
    assert np.array_equal(back["segmentation"].values, maps["segmentation"].values)


def test_up_to_124_segments_have_different_colours_at_least_half_a_unit_apart() -> None:
    ids = order_segments(np.arange(1, 125).reshape(4, 31))
    colours = segment_colours(ids).reshape(-1, 3)
    assert len(PALETTE) == 124 and len(np.unique(colours, axis=0)) == 124
    gaps = np.abs(colours[:, None] - colours[None]).max(axis=2) + np.eye(124)
    assert gaps.min() >= 0.5


def test_generated_depth_is_decoded_with_the_range_that_is_given() -> None:
    packed = np.zeros((CHANNELS, 2, 2), np.float32)
    packed[0] = [[1, -0.8], [-1, 0.1]]
    depth = unpack(packed, DepthRange("metric", 2.0, 8.0))["depth"]
    assert depth.values[0] == pytest.approx([2, 8]) and depth.values[1, 0] == np.inf
    assert depth.values[1, 1] == pytest.approx(4) and depth.info["kind"] == "metric"
