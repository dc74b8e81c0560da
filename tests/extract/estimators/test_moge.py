"""MoGe-2: like its authors' code to the last digits, its checkpoints, the camera it finds, and its maps in our conventions.

What their code gives for weights and pictures made by a rule (tests.support.seeded) is kept in fixtures;
tests.support.upstream_geometry
made them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares
from torch import Tensor, nn

from extract.estimators import Estimator
from extract.estimators.batching import NetworkEstimator
from extract.estimators.moge import MoGe, camera, focal_and_shift, load, prepare, working_size
from extract.estimators.nets.moge_net import MoGeConfig, MoGeNet, RawMaps, from_published, view_plane
from shards.core.errors import UsageError, UserError
from shards.intrinsics import INTRINSICS
from tests.support.seeded import (
    FIXTURES,
    MOGE_FOCAL,
    MOGE_GAINS,
    angles,
    like_a_camera,
    on_grid,
    read_fixture,
    seeded_picture,
    seeded_weights,
    unfold_names,
)

TOKENS = 60


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def checkpoint(size: str) -> dict[str, Any]:
    """A checkpoint as its authors publish it."""
    names = read_fixture("moge_names.json")[size]
    weights = seeded_weights(unfold_names(names), MOGE_GAINS)
    like_a_camera(weights, MOGE_FOCAL)
    return {"model_config": names["config"], "model": weights}


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return checkpoint("s")


def loaded(published: dict[str, Any], folder: Path) -> Estimator:
    torch.save(published, folder / "model.pt")
    return load(device="cpu", dtype="float32", weights=folder, file="model.pt", tokens=TOKENS)


@pytest.fixture(scope="module")
def estimate(published: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Estimator:
    return loaded(published, tmp_path_factory.mktemp("moge"))


@pytest.fixture(scope="module", params=["s", "b"])
def seeded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Estimator]:
    size: str = request.param
    if size == "s":
        return size, request.getfixturevalue("estimate")
    return size, loaded(checkpoint(size), tmp_path_factory.mktemp("moge"))


# ---- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["90x120", "131x97", "168x168"])
def test_depth_and_normals_are_those_of_its_authors_code(seeded: tuple[str, Estimator], image: str) -> None:
    size, estimate = seeded
    with np.load(FIXTURES / f"moge_{size}.npz") as fixture:
        depth, *normal, mask = fixture[image]
        focal_px = float(fixture[f"{image}/focal_px"])
    geometry = mask > 0.5
    assert geometry.sum() > 50 and (~geometry).sum() > 50 and depth[geometry].std() > 0.5, "nothing to compare"
    maps = estimate([seeded_picture(*map(int, image.split("x")))])[0]
    z = on_grid(torch.from_numpy(maps["depth"].values)[None])[0]
    n = on_grid(torch.from_numpy(maps["normal"].values).permute(2, 0, 1))
    assert (np.isfinite(z) == geometry).all()
    # Theirs stop the search for the camera at a tolerance of 1e-3, ours goes to the end: the rest is far smaller.
    assert np.abs(z - depth)[geometry].mean() < 1e-3
    theirs = torch.from_numpy(np.stack(normal) * np.array([1, -1, -1], np.float32)[:, None, None])
    assert angles(torch.from_numpy(n)[:, geometry], theirs[:, geometry]).mean() < 0.05
    assert maps["depth"].info["focal_px"] == pytest.approx(focal_px, rel=2e-3)
    assert maps["depth"].info["focal_from"] == "estimated"


@pytest.mark.parametrize(("size", "megabytes"), [("s", 140.55), ("b", 419.11), ("l", 1323.6)])
def test_every_name_of_a_published_checkpoint_has_its_place(size: str, megabytes: float) -> None:
    names = read_fixture("moge_names.json")[size]
    weights = {name: torch.empty(shape, device="meta") for name, shape in unfold_names(names).items()}
    with torch.device("meta"):
        net = MoGeNet(MoGeConfig.from_checkpoint(names["config"]))
    net.load_state_dict(from_published(weights), strict=True, assign=True)
    # The published files of S and B have 140 550 416 and 419 110 160 bytes: the numbers, and 0.14 MB of names.
    assert 4e-6 * sum(weight.numel() for weight in weights.values()) == pytest.approx(megabytes, abs=0.2)


def test_the_view_plane_ends_half_a_pixel_within_the_corners_of_the_image() -> None:
    plane = view_plane(2, 4, torch.tensor([1.5, 2.0]))
    assert plane.shape == (2, 2, 4, 2)
    diagonal = np.hypot(1.5, 1)
    np.testing.assert_allclose(plane[0, 0, 0], [-1.5 / diagonal * 3 / 4, -1 / diagonal / 2], rtol=1e-6)
    np.testing.assert_allclose(plane[1, 1, 3], [2 / 5**0.5 * 3 / 4, 1 / 5**0.5 / 2], rtol=1e-6)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def with_weights(published: dict[str, Any], **changes: Tensor | None) -> dict[str, Any]:
    weights = {name: value for name, value in published["model"].items() if changes.get(name, value) is not None}
    return published | {"model": weights | {name: value for name, value in changes.items() if value is not None}}


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale_head.0.bias", None), ("refiner.weight", torch.zeros(1)), ("scale_head.0.bias", torch.zeros(7))],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    published: dict[str, Any], tmp_path: Path, name: str, value: Tensor | None
) -> None:
    torch.save(with_weights(published, **{name: value}), tmp_path / "model.pt")
    with pytest.raises(UserError, match=name):
        load(device="cpu", dtype="float32", weights=tmp_path, file="model.pt", tokens=TOKENS)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("normal_head",), None, "normal_head"),
        (("encoder", "backbone"), "dinov3_vits16", "dinov3_vits16"),
        (("remap_output",), "sinh", "sinh"),
        (("neck", "resamplers"), "lanczos", "lanczos"),
        (("neck", "activation"), "tanh", "tanh"),
        (("mask_head", "res_block_in_norm"), "batch_norm", "batch_norm"),
        (("points_head", "gates"), 2, "gates"),
    ],
)
def test_a_network_of_another_kind_is_refused_in_words(path: tuple[str, ...], value: Any, says: str) -> None:
    config = read_fixture("moge_names.json")["s"]["config"]
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(UserError, match=says), torch.device("meta"):
        MoGeNet(MoGeConfig.from_checkpoint(config))


def test_other_files_and_settings_without_meaning_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="model_config"):
        load(device="cpu", dtype="float32", weights=tmp_path, file="model.pt", tokens=TOKENS)
    with pytest.raises(UsageError, match="tokens"):
        load(device="cpu", dtype="float32", weights=tmp_path, file="model.pt", tokens=0)


# ---- the camera ------------------------------------------------------------------------------------------------------


def scene(focal: float, shift: float, size: tuple[int, int], seed: int) -> Tensor:
    """Points (3, H, W) that a camera sees in their pixels once `shift` is added to z."""
    z = 1 + 3 * torch.rand(size, generator=torch.Generator().manual_seed(seed))
    plane = view_plane(*size, torch.tensor([size[1] / size[0]]))[0]
    return torch.cat([plane.permute(2, 0, 1) * z / focal, (z - shift)[None]])


def test_focal_length_and_shift_are_found_for_images_of_any_size_together() -> None:
    truth = [(1.2, 0.5, (90, 120)), (0.7, -0.8, (64, 64)), (3.0, 0.0, (200, 80)), (1.0, 0.9, (33, 50))]
    points = [scene(focal, shift, size, i) for i, (focal, shift, size) in enumerate(truth)]
    focal, shift = camera(points, [torch.ones(size, dtype=torch.bool) for _, _, size in truth])
    np.testing.assert_allclose(focal, [row[0] for row in truth], rtol=1e-4)
    np.testing.assert_allclose(shift, [row[1] for row in truth], atol=1e-4)


def test_points_without_geometry_do_not_count() -> None:
    points, known = scene(1.2, 0.5, (64, 64), 0), torch.ones(64, 64, dtype=torch.bool)
    points[:, :20] = torch.tensor([9.0, -9.0, 0.0])[:, None, None]
    known[:20] = False
    focal, shift = camera([points], [known])
    assert float(focal) == pytest.approx(1.2, rel=1e-4) and float(shift) == pytest.approx(0.5, abs=1e-4)


def test_without_geometry_nothing_is_shifted() -> None:
    focal, shift = camera([scene(1.2, 0.5, (64, 64), 0)], [torch.zeros(64, 64, dtype=torch.bool)])
    assert (float(focal), float(shift)) == (1.0, 0.0)


@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_noisy_points_give_what_scipy_finds(noise: float) -> None:
    generator = torch.Generator().manual_seed(1)
    xyz = torch.stack([scene(1.1, shift, (64, 64), i).flatten(1) for i, shift in enumerate((0.3, -0.4, 0.6))])
    xyz = xyz + noise * torch.randn(xyz.shape, generator=generator) * torch.tensor([1.0, 1.0, 0.3])[:, None]
    plane = view_plane(64, 64, torch.ones(3)).flatten(1, 2).transpose(1, 2)
    focal, shift = focal_and_shift(xyz, plane, torch.ones(3, 64 * 64, dtype=torch.bool))
    for i in range(3):
        (x, z), uv = (xyz[i, :2].double().numpy(), xyz[i, 2].double().numpy()), plane[i].double().numpy()

        def residual(s: np.ndarray, x: np.ndarray = x, z: np.ndarray = z, uv: np.ndarray = uv) -> np.ndarray:
            p = x / (z + s)
            return ((p * uv).sum() / (p * p).sum() * p - uv).ravel()

        best = least_squares(residual, x0=0.0, method="lm", ftol=1e-12, xtol=1e-12, gtol=1e-12).x[0]
        p = x / (z + best)
        assert float(shift[i]) == pytest.approx(best, abs=1e-4)
        assert float(focal[i]) == pytest.approx((p * uv).sum() / (p * p).sum(), rel=1e-4)


# ---- the estimator ---------------------------------------------------------------------------------------------------


def test_a_batch_of_mixed_sizes_gives_what_each_image_gives_alone(estimate: Estimator) -> None:
    images = [seeded_picture(*size) for size in ((90, 120), (120, 90), (45, 60), (91, 120), (30, 100))]
    for image, maps in zip(images, estimate(images), strict=True):
        alone = estimate([image])[0]
        for name in ("depth", "normal"):
            assert maps[name].values.shape[:2] == image.shape[:2]
            np.testing.assert_allclose(maps[name].values, alone[name].values, rtol=2e-3, atol=2e-3)
            INTRINSICS[name].encode(maps[name])  # raises where a convention is broken
        assert maps["depth"].info["focal_px"] == pytest.approx(alone["depth"].info["focal_px"], rel=1e-3)


@pytest.mark.parametrize(
    ("size", "tokens", "grid"), [((512, 512), 1800, (42, 42)), ((480, 640), 1200, (30, 40)), ((10, 4000), 60, (1, 155))]
)
def test_an_image_is_seen_in_about_that_many_patches(size: tuple[int, int], tokens: int, grid: tuple[int, int]) -> None:
    assert working_size(size, tokens) == (grid[0] * 14, grid[1] * 14)


class Room(nn.Module):
    """A network that sees a wall at 4 m and a sky above, with every pixel's normal that of a floor, at metric scale 2."""

    def forward(self, x: Tensor, aspects: Tensor) -> RawMaps:
        height, width = x.shape[2] // 14 * 16, x.shape[3] // 14 * 16
        plane = view_plane(height, width, aspects).permute(0, 3, 1, 2)
        depth = 1 + plane[:, 1:] ** 2  # without relief, focal length and shift cannot be told apart
        points = torch.cat([plane / 1.25, (depth - 0.5).log()], dim=1)
        points[:, :2] *= depth / (depth - 0.5)  # "exp": x and y are multiplied by z before the shift
        normal = torch.tensor([0.0, -3.0, 0.0])[None, :, None, None].expand(len(x), -1, height, width)
        mask = torch.where(torch.arange(height) < height // 4, -5.0, 5.0)[None, None, :, None].expand(
            len(x), 1, -1, width
        )
        return RawMaps(points, normal, mask, torch.full((len(x),), 2.0).log())


def test_points_become_metric_depth_normals_up_and_a_sky() -> None:
    device = torch.device("cpu")
    estimate = NetworkEstimator(
        MoGe(Room(), "exp"), lambda size: working_size(size, 900), device, torch.float32, prepare
    )
    maps = estimate([np.zeros((120, 160, 3), np.uint8)])[0]
    sky, ground = slice(0, 28), slice(32, 120)
    assert np.isposinf(maps["depth"].values[sky]).all() and np.isnan(maps["normal"].values[sky]).all()
    y = (np.arange(120) * 2 + 1 - 120) / 120 * 0.6
    expected = np.broadcast_to(2 * (1 + y**2)[:, None], (120, 160))
    np.testing.assert_allclose(maps["depth"].values[ground], expected[ground], rtol=5e-3)
    np.testing.assert_allclose(maps["normal"].values[ground], np.broadcast_to([0, 1, 0], (88, 160, 3)), atol=1e-6)
    assert maps["depth"].info["focal_px"] == pytest.approx(1.25 * 100, rel=5e-3)


def test_what_lies_behind_the_camera_is_invalid() -> None:
    found = {
        "depth": np.array([[1.0, -1.0]], np.float32),
        "valid": np.array([[True, True]]),
        "normal": np.array([[[0, 0]], [[0, 0]], [[-1, -1]]], np.float32),
        "focal": np.array(1.0, np.float32),
    }
    maps = MoGe(nn.Identity(), "exp").maps(found, (1, 2))
    np.testing.assert_array_equal(maps["depth"].values, np.array([[1.0, np.nan]], np.float32))
